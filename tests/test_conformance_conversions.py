"""Cases carried between frameworks, and the verdicts of `tt.convert` held against the suite's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tracetorch as tt
from tracetorch import adapters, conformance
from tracetorch.cli import main
from tracetorch.conformance import catalogue, conversions
from tracetorch.conformance.conversions import FRAMEWORKS, Conversions, Converted

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [
    *("comparison-strict", "comparison-inclusive", "reset-value", "reset-subtract", "reset-add-value", "reset-none"),
    *("timing-after-decay", "timing-residual-subtract", "timing-before-decay", "count-multiple", "count-limited"),
    *("gain-one-minus-decay", "clamp-after-reset", "synapse-add-then-decay", "spike-scale", "amount-value"),
    *("synapse-difference", "synapse-difference-value", "adaptation"),
    *("decay-geometric", "per-neuron", "raw-value", "raw-clamped", "raw-exp-tau", "raw-softplus"),
    *("gradient-attached", "gradient-detached", "gradient-detached-value", "gradient-attached-residual"),
    *("gradient-mem-decay-per-neuron", "gradient-threshold", "gradient-no-threshold", "gradient-input"),
    *("surrogate-atan", "surrogate-single-exponential", "surrogate-gaussian", "surrogate-triangular"),
]


# Whose whole networks are converted too.
WHOLE = ("tracetorch", "sinabs", "snntorch")


@pytest.fixture(scope="module")
def carried():
    cases = [*NAMES, "infinite"]
    groups = [conversions(group, cases) for group in (WHOLE, ("tracetorch", "spikingjelly", "norse"))]
    return Conversions(tuple(FRAMEWORKS), [row for group in groups for row in group.rows])


# Whose own classes express few of the cases.
FEW = {"brainpy": 20, "norse": 1}


def held(found, pairs, cases, least):
    """Every conversion is exact, rounding, refused or known, and to the native layers it is exact."""
    assert found.ok, found.matrix()
    assert len({(r.source, r.target) for r in found.rows}) == pairs
    assert len(found.rows) == pairs * cases
    for source, target in {(r.source, r.target) for r in found.rows}:
        own = [r for r in found.rows if (r.source, r.target) == (source, target)]
        wanted = FEW.get(source, 20 if target == "brainpy" else least)
        assert sum(r.there in ("exact", "rounding") for r in own) >= wanted, (source, target)
    native = [r for r in found.rows if r.target == "tracetorch" and r.there]
    # brainpy's step in XLA rounds otherwise than torch's.
    assert {r.there for r in native if r.source != "brainpy"} <= {"exact"}
    assert {r.back for r in native} == {"exact"}


def test_every_conversion_is_exact_rounding_refused_or_known(carried):
    held(carried, 12, len(NAMES) + 1, 10)


@pytest.mark.sweep
def test_so_it_is_in_every_case():
    held(conversions([name for name in FRAMEWORKS if name != "brainpy"]), 20, len(catalogue()), 50)


@pytest.mark.sweep
def test_so_it_is_with_brainpy():
    pytest.importorskip("brainpy")
    groups = [conversions(["brainpy", other]).rows for other in FRAMEWORKS if other != "brainpy"]
    held(Conversions(tuple(FRAMEWORKS), [row for rows in groups for row in rows]), 10, len(catalogue()), 50)


def test_the_checkers_reject(carried):
    row = Converted("sinabs", "snntorch", "comparison-strict", "exact", "exact")
    assert Conversions(("sinabs", "snntorch"), [row]).ok
    for verdict in ("divergent", "error"):
        assert not Conversions((), [Converted("sinabs", "snntorch", "comparison-strict", verdict, "exact")]).ok
        assert not Conversions((), [Converted("sinabs", "snntorch", "comparison-strict", "exact", verdict)]).ok
    assert not Conversions((), []).ok, "nothing carried"
    assert not Conversions((), [Converted("sinabs", "snntorch", "comparison-strict", "", "")]).ok
    assert Converted("sinabs", "snntorch", "infinite", "divergent", "exact").known
    assert not Converted("sinabs", "snntorch", "reset-value", "divergent", "exact").known
    assert "sinabs -> snntorch" in carried.matrix()
    with pytest.raises(ValueError, match="cannot be carried"):
        conversions(["nothing"])


def test_an_adapter_that_drops_a_choice_is_found(monkeypatch):
    """A build that forgets what it was given: the clamp, the input gain, the count of spikes."""
    from tracetorch.conformance.subjects.layers import LayerSubject

    original = LayerSubject.make

    def forgetful(self, spec, building):
        if self.name == "sinabs-adapted":
            spec = spec.replace(input_gain="one")
        return original(self, spec, building)

    monkeypatch.setattr(LayerSubject, "make", forgetful)
    found = conversions(["tracetorch", "sinabs"], ["input_gain.one_minus_decay"])
    assert [r.there for r in found.rows if r.target == "sinabs"] == ["divergent"]
    assert not found.ok


def converted(source, layer, case, target):
    """The verdicts of `tt.convert`; "refused" where it refuses."""
    x = torch.tensor(case.x)
    stepped = source not in ("sinabs", "brainpy")
    try:
        result = tt.convert(
            nn.Sequential(layer),
            to=target,
            sample=x if stepped else x.transpose(0, 1).contiguous(),
            time_dim=0 if stepped else None,
        )
    except adapters.ConversionError:
        return "refused", ""
    [row] = result.report
    return row.forward, row.gradient


def held_against_the_suite(carried, source, targets, names):
    """The verdicts of `tt.convert` in every case that the source has, each compared with the suite's."""
    compared, slopes = [], []
    for name in names:
        case = catalogue()[name]
        subject = conformance.subject(FRAMEWORKS[source][0])
        try:
            subject.build(case.spec.to_dict())
        except conformance.Unsupported:
            continue
        for target in targets:
            if target == source:
                continue
            [row] = [r for r in carried.rows if (r.source, r.target, r.case) == (source, target, name)]
            reported, gradient = converted(source, subject.layer, case, target)
            expected = {"unsupported": "refused", "divergent": "refused"}.get(row.there, row.there)
            assert reported == expected, (name, target, reported, row)
            compared.append(reported)
            if gradient and row.gradient:
                said = {"unsupported": "differs", "divergent": "differs"}.get(row.gradient, row.gradient)
                assert gradient == said, (name, target, gradient, row)
                slopes.append(gradient)
    return compared, slopes


@pytest.mark.parametrize("source", WHOLE)
def test_what_convert_reports_is_what_the_suite_measures(carried, source):
    compared, slopes = held_against_the_suite(carried, source, WHOLE, NAMES)
    assert len(compared) > 24
    assert len(slopes) > 8
    assert "exact" in compared
    assert "exact" in slopes


SOME = ("reset-subtract", "count-multiple", "refractory-time")


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ("tracetorch", SOME),
        *(pytest.param(name, (*NAMES, "refractory-time"), marks=pytest.mark.sweep) for name in WHOLE),
    ],
)
def test_so_it_is_from_and_to_brainpy(other, names):
    pytest.importorskip("brainpy")
    found = conversions(["brainpy", other], names)
    assert found.ok, found.matrix()
    from_it, _ = held_against_the_suite(found, "brainpy", [other], names)
    to_it, slopes = held_against_the_suite(found, other, ["brainpy"], names)
    assert {"rounding"} <= set(from_it) <= {"rounding", "refused"}
    assert "refused" in to_it
    assert len(from_it) >= 2
    assert len(to_it) >= len(SOME)
    assert "rounding" in slopes or other == "snntorch"


def test_the_command_carries_between_those_that_are_installed(capsys, monkeypatch):
    original = conformance.subject

    def without(name):
        if name in ("spikingjelly", "norse", "brainpy"):
            raise ImportError(f"{name} is not installed")
        return original(name)

    monkeypatch.setattr(conformance, "subject", without)
    assert main(["conformance", "--conversions", "--cases", "comparison", "infinite"]) == 0
    printed = capsys.readouterr()
    assert "snntorch -> sinabs" in printed.out
    assert "brainpy" not in printed.out
    assert "left out: brainpy: brainpy is not installed" in printed.err
    assert main(["conformance", "--conversions", "--subjects", "nothing"]) == 2
