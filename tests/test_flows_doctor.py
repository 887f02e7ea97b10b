"""`ratchet doctor` shows no secret, and says what of the configuration a round would refuse."""

import pytest

from flows.doctor import _loop, _servers


def test_a_password_in_a_servers_address_is_not_shown(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter22@127.0.0.1:9")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    prefect, mlflow = _servers()
    assert prefect.level == "ok"
    assert mlflow.level == "error"
    assert "127.0.0.1:9" in mlflow.found
    assert "hunter22" not in f"{prefect} {mlflow}"


@pytest.mark.parametrize(
    ("overrides", "level", "found"),
    [
        (["search.strategy=baem"], "error", "did you mean beam?"),
        (["search.strategy=beam(width=2)"], "error", "needs a verifier"),
        (["search.strategy=beam(width=2)", "verifier.type=oracle"], "ok", "plain(4) + beam(width=2) @ 4"),
        ([], "ok", "best_of_n(8)"),
    ],
)
def test_the_search_is_looked_at(tmp_path, overrides, level, found):
    (search,) = [finding for finding in _loop("smoke", overrides, tmp_path) if finding.what == "search"]
    assert search.level == level
    assert found in search.found
    assert bool(search.advice) == (level == "error")
