import math

from tasks.artifacts import layer_rows


def test_a_row_of_the_layers_table_holds_plain_values_only() -> None:
    layer = {"name": "block 1", "top1": 0.123456, "knn": {"1": 0.5, "20": math.nan}, "rank": 7}
    assert layer_rows([layer]) == [
        {"name": "block 1", "top1": 0.1235, "knn_1": 0.5, "knn_20": None, "rank": 7}
    ]
