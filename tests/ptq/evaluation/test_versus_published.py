"""When is a new model worse than the version in service, and when is that chance?"""

import numpy as np
import pytest

from ptq.evaluation.versus_published import amax_drift, compare, drift_factor, held_against, incomparable
from ptq.numerics.paired_test import paired_comparison
from ptq.records.benchmark import PublishedLatency
from ptq.records.decision import GateDecision, PublishedModel

ACCEPTED = GateDecision(True, ("The gate held.",))


def paired(*, images, lost, gained):
    """The version in service against the new model: `lost` and `gained` images of which one alone is right."""
    labels = np.zeros(images, dtype=int)
    published, new = labels.copy(), labels.copy()
    new[:lost] = 1
    published[lost : lost + gained] = 1
    return paired_comparison(published, new, labels)


def compared(comparison, latencies=(), *, limit=0.5, slowdown=1.1, published=None, new=None):
    return compare(
        version="abc", published_top1_percent=90.0, new_top1_percent=90.0 - comparison.drop_pp, paired=comparison,
        latencies=latencies, published_amax=published or {"conv1": 1.0}, new_amax=new or {"conv1": 1.0},
        max_regression_pp=limit, max_slowdown=slowdown,
    )  # fmt: skip


def latency(ratio, *turns):
    return PublishedLatency(1, 2.0 * ratio, 2.0, turns or (ratio,) * 16)


def test_a_loss_beyond_limit_and_chance_is_a_regression():
    found = compared(paired(images=1000, lost=40, gained=5))
    assert found.decision == "regress"
    assert found.reasons[0].startswith("Against the version in service top-1 changes by -3.50 pp on 1000 images")


def test_a_loss_beyond_the_limit_that_chance_can_explain_is_inconclusive():
    found = compared(paired(images=200, lost=5, gained=3))
    assert found.paired.drop_pp == 1.0
    assert found.decision == "inconclusive"
    assert "The interval includes 0: these images cannot tell the two apart." in found.reasons[0]


def test_a_loss_within_the_limit_is_accepted_even_where_it_is_beyond_chance():
    found = compared(paired(images=100_000, lost=400, gained=0))
    assert found.paired.drop_interval_pp[0] > 0
    assert found.decision == "accept"


def test_a_gain_is_accepted():
    found = compared(paired(images=1000, lost=2, gained=9))
    assert found.decision == "accept"
    assert "+0.70 pp" in found.reasons[0]


def test_a_model_slower_in_nearly_every_turn_is_a_regression():
    found = compared(paired(images=100, lost=0, gained=0), [latency(1.3, *(12 * [1.3]), *(4 * [1.0]))])
    assert found.decision == "regress"
    assert "1.30 times at batch 1 (2.600 against 2.000 ms)" in found.reasons[0]


def test_a_model_slower_in_somewhat_more_than_half_of_the_turns_is_inconclusive():
    found = compared(paired(images=100, lost=0, gained=0), [latency(1.3, *(9 * [1.3]), *(7 * [1.0]))])
    assert found.decision == "inconclusive"
    assert "Only 9 of 16 turns were slower: the machine may have been busy." in found.reasons[0]


def test_a_machine_that_was_busy_in_a_few_turns_does_not_count_against_the_model():
    busy = PublishedLatency(1, 6.0, 2.0, (*(5 * [3.0]), *(11 * [1.0])))
    assert compared(paired(images=100, lost=0, gained=0), [busy]).decision == "accept"


def test_a_few_turns_cannot_show_a_regression():
    found = compared(paired(images=100, lost=0, gained=0), [latency(1.3, 1.3, 1.3, 1.3, 1.3)])
    assert found.decision == "inconclusive"


def test_the_severer_of_accuracy_and_speed_decides_and_is_named_first():
    found = compared(paired(images=200, lost=5, gained=3), [latency(1.3)])
    assert found.decision == "regress"
    assert found.reasons[0].startswith("Its latency, turn by turn, is")
    assert found.reasons[1].startswith("Against the version in service")


def test_a_layer_whose_amax_moved_far_is_named():
    found = compared(
        paired(images=100, lost=0, gained=0), published={"conv1": 1.0, "fc": 2.0}, new={"conv1": 5.0, "fc": 2.0}
    )
    assert found.reasons[-1] == "The amax of 1 layer moved by more than 2 times: conv1 (1 to 5)."
    assert found.decision == "accept"


def test_quantizers_that_only_one_model_has_are_listed_and_not_compared():
    found = compared(paired(images=100, lost=0, gained=0), published={"a": 1.0, "b": 1.0}, new={"b": 1.0, "c": 1.0})
    assert found.quantizers_of_one_alone == ("a", "c")
    assert [item.quantizer for item in found.drift] == ["b"]


def test_an_amax_that_became_zero_moved_infinitely_far_and_one_that_stayed_zero_did_not_move():
    drift = amax_drift({"dead": 0.0, "dying": 1.0}, {"dead": 0.0, "dying": 0.0})
    assert [(item.quantizer, drift_factor(item)) for item in drift] == [("dying", float("inf")), ("dead", 1.0)]


def test_a_latency_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="median latencies at batch 1 are nan and 2.0 ms"):
        compared(paired(images=10, lost=0, gained=0), [latency(float("nan"))])


def test_a_regressed_model_is_not_accepted_and_the_reason_names_the_version():
    comparison = compared(paired(images=1000, lost=40, gained=5))
    decision = held_against(ACCEPTED, comparison, publish_inconclusive=True)
    assert not decision.accepted
    assert decision.reasons[0].startswith("The model is worse than version abc in service, which stays. Against the")
    assert decision.reasons[-1] == "The gate held."


@pytest.mark.parametrize("publish", [True, False])
def test_an_inconclusive_model_is_published_only_where_that_is_asked_for(publish):
    comparison = compared(paired(images=200, lost=5, gained=3))
    assert held_against(ACCEPTED, comparison, publish_inconclusive=publish).accepted is publish


def test_what_the_gate_rejected_stays_rejected():
    comparison = compared(paired(images=100, lost=0, gained=0))
    assert not held_against(GateDecision(False, ("Too slow.",)), comparison, publish_inconclusive=True).accepted


def test_a_version_that_cannot_be_compared_is_inconclusive_and_says_what_to_do():
    found = incomparable(PublishedModel("abc", None, None, "it has no graph of the dialect cpu"))
    assert found.decision == "inconclusive"
    assert found.reasons == (
        "Version abc in service cannot be compared: it has no graph of the dialect cpu. Publish under another name "
        "(model.publish_as), or set gate.publish_inconclusive.",
    )
