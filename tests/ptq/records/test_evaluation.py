from ptq.records.evaluation import in_method_order


def test_labels_of_percentiles_stand_where_the_method_stands():
    labels = ["per_layer", "entropy", "percentile-99.9", "mse", "percentile-99", "max"]
    assert in_method_order(labels) == ("max", "percentile-99.9", "percentile-99", "mse", "entropy", "per_layer")
