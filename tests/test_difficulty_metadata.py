import numpy as np

from difficulty.metadata import features, features_like


def test_numbers_and_lists_of_numbers_are_found():
    names, values = features(
        [{"numbers": [3, 5, 7], "target": 22, "line": 1}, {"numbers": [2, 2], "target": 4, "line": 2}]
    )
    assert names == ("numbers: how many", "numbers: least", "numbers: mean", "numbers: most", "target")
    assert values.tolist() == [[3, 3, 5, 7, 22], [2, 2, 2, 2, 4]]


def test_a_level_is_a_number_and_what_says_nothing_is_left_out():
    names, values = features([{"level": "Level 5", "subject": "Algebra"}, {"level": "Level 2", "subject": "Algebra"}])
    assert (names, values.tolist()) == (("level",), [[5], [2]])
    assert features([{"line": 3, "id": "7"}, {"line": 4, "id": "8"}])[0] == ()
    assert features([{"operations": 4}, {"operations": 4}])[0] == ()
    assert features([])[0] == ()


def test_a_missing_feature_is_the_mean_of_the_others():
    _, values = features([{"a": 1}, {"a": 3}, {}])
    assert values[:, 0].tolist() == [1, 3, 2]


def test_what_is_no_finite_number_is_none():
    assert features([{"a": float("nan"), "b": None, "c": "no", "d": {}}, {"a": 1.0}, {"a": 1.0}])[0] == ()


def test_other_problems_have_the_same_features():
    names, _ = features([{"a": 1, "b": [1, 2]}, {"a": 2, "b": [4]}])
    found = features_like(names, [{"a": 9, "c": 4}])
    assert found.shape == (1, len(names))
    assert found[0, names.index("a")] == 9
    assert np.isnan(found[0, names.index("b: mean")])
