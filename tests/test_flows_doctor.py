"""`ratchet doctor` shows no secret."""

from flows.doctor import _servers


def test_a_password_in_a_servers_address_is_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter22@127.0.0.1:9")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    prefect, mlflow = _servers()
    assert prefect.level == "ok"
    assert mlflow.level == "error"
    assert "127.0.0.1:9" in mlflow.found
    assert "hunter22" not in f"{prefect} {mlflow}"
