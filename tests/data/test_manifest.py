from data.manifest import digest_of


def test_digests_follow_values_and_not_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2, None]}) == digest_of({"b": [2, None], "a": 1})
    different = [{"a": 1}, {"a": "1"}, {"a": [1]}, {"b": 1}, ["a", 1], None, {}]
    assert len({digest_of(content) for content in different}) == len(different)
