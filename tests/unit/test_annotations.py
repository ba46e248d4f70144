import numpy as np
import pytest

from aullm_dist.data.annotations import ActionUnit, AnnotationError, parse_aus
from aullm_dist.errors import UserError

VECTORS = [
    ("4+R12", {4, 12}),
    ("4.0", {4}),
    (" 12.00 ", {12}),
    ("L1+R2", {1, 2}),
    ("14?", {14}),
    ("4+7+A", {4, 7}),
    ("\uff10\uff19+1\uff17", {9, 17}),  # full-width digits, the first and the last of them too
    ("4\uff0c7", {4, 7}),
    ("4\uff0b7", {4, 7}),
    ("4\u30017", {4, 7}),
    ("4,7", {4, 7}),
    ("4 & 7; 12|14", {4, 7, 12, 14}),
    ("4+L10", {4, 10}),
    ("A1B+A2C", {1, 2}),
    ("12C", {12}),
    ("AU4(k)+L7", {7}),
    ("AU4 ( K ) + l7", {7}),
    ("AUR2+12(k)+45", {2, 45}),
    ("R12 + R15", {12, 15}),
    ("R14A or 17A", {14}),
    ("4(k)+4", {4}),
    ("AU 06", {6}),
    ("43+45", {43, 45}),
    ("/", set()),
    ("-", set()),
    ("", set()),
    ("  ", set()),
    (None, set()),
    (float("nan"), set()),
    (np.float64("nan"), set()),
    (4, {4}),
    (4.0, {4}),
    ("4", {4}),
    (np.int64(12), {12}),
]


@pytest.mark.parametrize(("cell", "active"), VECTORS, ids=[ascii(cell) for cell, _ in VECTORS])
def test_active_aus(cell, active):
    assert parse_aus(cell).active == active


@pytest.mark.parametrize(
    "cell",
    [
        "1417",
        1417,
        "banana",
        "4+banana",
        "4-7",
        "4/7",
        "F4",
        "0",
        "4.5",
        4.5,
        -4,
        True,
        float("inf"),
        "or 4",
        "4 or",
        "(k)",
        "123",
    ],
)
def test_cells_outside_the_grammar_are_errors(cell):
    with pytest.raises(AnnotationError) as caught:
        parse_aus(cell)
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert repr(cell) in message
    assert "allowed" in message
    assert "\n" not in message


def test_attributes_of_a_unit_are_kept():
    assert parse_aus("R14a?").units == (ActionUnit(14, side="R", intensity="A", uncertain=True),)
    assert parse_aus("12 (k)").units == (ActionUnit(12, static=True),)
    assert parse_aus("12(k)?+4").units == (ActionUnit(12, uncertain=True, static=True), ActionUnit(4))
    assert parse_aus("AUR2").units == (ActionUnit(2, side="R"),)
    assert parse_aus("A1B").units == (ActionUnit(1, side="A", intensity="B"),)


def test_detached_marks_belong_to_the_token_before():
    assert parse_aus("4 ? + 7").units == (ActionUnit(4, uncertain=True), ActionUnit(7))
    assert parse_aus("4+12 (k)").active == {4}


@pytest.mark.parametrize(("policy", "active"), [("first", {4, 14}), ("all", {4, 14, 17}), ("drop", set())])
def test_alternatives_follow_the_policy_and_are_uncertain(policy, active):
    annotation = parse_aus("4+R14A or 17A", alternatives=policy)
    assert annotation.active == active
    assert annotation.uncertain
    assert all(unit.uncertain for unit in annotation.units)


def test_uncertain_only_where_something_is():
    assert parse_aus("4+14?").uncertain
    assert not parse_aus("4+14").uncertain
    with pytest.raises(ValueError, match="first"):
        parse_aus("4", alternatives="guess")


def test_every_alternative_must_be_valid():
    with pytest.raises(AnnotationError, match="banana"):
        parse_aus("4 or banana")


def test_a_long_cell_does_not_flood_the_message():
    with pytest.raises(AnnotationError) as caught:
        parse_aus("x" * 5000)
    assert len(str(caught.value)) < 400
    assert str(caught.value).startswith("AU cell 'xxxx")
