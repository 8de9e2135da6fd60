"""`tracetorch demo`: its files, what it claims and when it refuses to, on the quick version."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image

from tracetorch import adapters
from tracetorch.cli import demo, main

TARGET = {
    "accuracy",
    "source_accuracy",
    "spike_mismatches",
    "unexplained_mismatches",
    "spike_slots",
    "max_state_difference",
    "gradient_error",
    "milliseconds",
    "source_milliseconds",
    "layers",
}
LAYERS = ["conv", "conv_lif", "pool", "flatten", "hidden", "hidden_lif", "output", "output_lif"]
SLOTS = 48 * 12 * (8 * 8 * 8 + 64 + 10)  # digits, steps, neurons of the quick version


def read(folder: Path) -> dict[str, Any]:
    """demo.json; NaN and infinity are not JSON and fail."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in demo.json")

    facts: dict[str, Any] = json.loads((folder / "demo.json").read_text(encoding="utf-8"), parse_constant=refuse)
    return facts


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick run that holds; the process's generator and threads are as before."""
    out = tmp_path_factory.mktemp("demo")
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    return out


# ---------------------------------------------------------------- what a run leaves


def test_the_json_has_its_schema(quick: Path) -> None:
    facts = read(quick)
    assert facts["ok"] is True
    assert facts["failures"] == []
    assert facts["quick"] is True
    assert (facts["steps"], facts["epochs"], facts["seed"], facts["held_out"]) == (12, 2, 0, 48)
    assert {"tracetorch", "torch", "snntorch", "sinabs"} <= set(facts["versions"])
    assert set(facts["targets"]) == {"tracetorch", "sinabs"}
    for target in facts["targets"].values():
        assert set(target) == TARGET
        assert all(math.isfinite(value) for name, value in target.items() if name != "layers")
        assert [layer["name"] for layer in target["layers"]] == LAYERS
        assert all(set(layer) == {"name", "forward", "gradient", "reason"} for layer in target["layers"])


def test_native_is_bit_identical(quick: Path) -> None:
    native = read(quick)["targets"]["tracetorch"]
    assert [layer["forward"] for layer in native["layers"]] == ["exact"] * len(LAYERS)
    assert (native["spike_mismatches"], native["unexplained_mismatches"]) == (0, 0)
    assert native["max_state_difference"] == 0
    assert native["accuracy"] == native["source_accuracy"]
    assert native["spike_slots"] == SLOTS


def test_sinabs_differs_by_rounding_only(quick: Path) -> None:
    sinabs = read(quick)["targets"]["sinabs"]
    assert {layer["forward"] for layer in sinabs["layers"]} <= {"exact", "rounding"}
    assert sinabs["unexplained_mismatches"] == 0
    assert sinabs["spike_mismatches"] <= SLOTS * 1e-5
    assert sinabs["spike_slots"] == SLOTS
    assert abs(sinabs["accuracy"] - sinabs["source_accuracy"]) <= 1.001 / 48


def test_both_targets_are_held_against_the_same_source_and_close_in_gradients(quick: Path) -> None:
    targets = read(quick)["targets"]
    assert targets["tracetorch"]["source_accuracy"] == targets["sinabs"]["source_accuracy"] > 0.3  # chance is 0.1
    for target in targets.values():
        assert {layer["gradient"] for layer in target["layers"]} <= {"exact", "rounding", "reparametrised"}
        assert 0 < target["gradient_error"] < 1e-4  # measured against float64: 0 would be no measurement
        assert min(target["milliseconds"], target["source_milliseconds"]) > 0


def test_the_picture_shows_all_three(quick: Path) -> None:
    assert (quick / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(quick / "demo.png")[..., :3]
    assert pixels.shape == (900, 1600, 3)
    for _, colour, _ in demo.SHOWN.values():
        wanted = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        drawn = (np.abs(pixels - wanted).max(-1) < 0.02).nonzero()
        assert len(drawn[0]) > 1000  # title, raster, membrane
        assert np.ptp(drawn[1]) < 500  # in a column of its own


def test_a_run_is_repeatable_and_a_terminal_gets_its_progress_bar(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["demo", "--quick", "--out", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b[" in printed
    assert "training in snnTorch" in printed
    first, second = read(quick), read(tmp_path / "new" / "folder")
    for facts in (first, second):
        for target in facts["targets"].values():
            del target["milliseconds"], target["source_milliseconds"]
    assert first == second


def test_the_table_has_the_figures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--quick", "--steps", "8", "--seed", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b[" not in printed
    total = f"0 of {SLOTS * 8 // 12:,}, 0 unexplained"
    for text in ("snntorch -> tracetorch", "snntorch -> sinabs", "test accuracy", total, "gradient agreement"):
        assert text in printed
    for text in (*LAYERS, "largest state difference", "time per 24 digits", "Still the same network"):
        assert text in printed
    assert read(tmp_path)["seed"] == 3


def test_what_is_drawn_is_what_the_frameworks_store() -> None:
    torch.manual_seed(0)
    xs = 3 * torch.rand(20, 1, 1, 8, 8)
    network = demo.build_network()
    spikes, membrane = demo.watch("snntorch", network, lambda x: demo.run_source(network, x), xs)
    assert spikes.shape == membrane.shape == (20, 64)
    assert spikes.sum() > 20
    layer: Any = network.get_submodule(demo.WATCHED)
    threshold = layer.threshold.detach().numpy()
    assert np.array_equal(spikes > 0, membrane > threshold)  # before the reset
    for to in ("tracetorch", "sinabs"):
        result = adapters.convert(network, to=to, sample=xs, time_dim=0)
        own, stored = demo.watch(to, result.model, result.run, xs)
        assert np.array_equal(own, spikes)
        if to == "tracetorch":
            assert np.array_equal(stored, membrane)
        else:
            restored = stored + own * threshold / layer.beta.detach().numpy()
            assert np.abs(restored - membrane).max() < 1e-5
            assert np.abs(stored - membrane).max() > 0.5
            assert not any(getattr(module, "record_states", False) for module in result.model.modules())
        assert not any(module._forward_hooks for module in result.model.modules())


# ---------------------------------------------------------------- when it does not hold


@pytest.mark.parametrize("framework", ["tracetorch", "sinabs"])
def test_a_fault_in_the_target_is_found(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = adapters.convert

    def faulty(network: torch.nn.Module, to: str, **options: Any) -> adapters.Conversion:
        result = convert(network, to=to, **options)
        named = dict(result.model.get_submodule("hidden_lif").named_parameters())
        (threshold,) = (parameter for name, parameter in named.items() if "threshold" in name)
        if to == framework:
            threshold.data *= 1.01
        return result

    monkeypatch.setattr(adapters, "convert", faulty)
    assert main(["demo", "--quick", "--steps", "8", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"FAILED  {framework}: hidden_lif: approximate" in printed
    assert "Still the same network" not in printed
    facts = read(tmp_path)
    assert facts["ok"] is False
    assert all(failure.startswith(f"{framework}: ") for failure in facts["failures"])
    assert facts["targets"][framework]["unexplained_mismatches"] > 0
    (other,) = set(facts["targets"]) - {framework}
    assert facts["targets"][other]["unexplained_mismatches"] == 0
    assert (tmp_path / "demo.png").exists()


def test_a_refused_conversion_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise adapters.ConversionError("'hidden_lif'", "reset", "subtract", "planted", "none")

    monkeypatch.setattr(adapters, "convert", refuse)
    assert main(["demo", "--quick", "--steps", "4", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "sinabs: not converted: layer 'hidden_lif'" in " ".join(capsys.readouterr().out.split())
    facts = read(tmp_path)
    assert facts["ok"] is False
    assert facts["targets"] == {}
    assert len(facts["failures"]) == 2


def outcome(framework: str, neuron: dict[str, Any] | None = None, **changes: Any) -> demo.Outcome:
    """A target of which all holds, with changes to its one neuron layer, its agreement or itself."""
    row = adapters.LayerRow("lif", "Leaky", "LIF", True, "exact", "exact", "", slots=10**6, spikes=10.0)
    rows = (replace(row, **(neuron or {})),)
    agreement = adapters.Agreement("snntorch", framework, rows, changed_parameters=changes.pop("changed", ()))
    conversion: Any = None
    return replace(demo.Outcome(framework, conversion, agreement, 450, 440, 440, 1.0, 1.0), **changes)


@pytest.mark.parametrize("framework", ["tracetorch", "sinabs"])
@pytest.mark.parametrize(
    ("neuron", "changes", "said"),
    [
        ({"forward": "approximate"}, {}, "approximate"),
        ({"spikes": 0.0}, {}, "never fired"),
        ({"unexplained_mismatches": 1}, {}, "no rounding explains"),
        ({"spike_mismatches": 11}, {}, "spikes differ"),
        ({"gradient_error": math.inf}, {}, "not finite"),
        ({"max_state_difference": math.nan}, {}, "not finite"),
        ({}, {"changed": ("lif.beta",)}, "not the source's value"),
        ({}, {"correct": 442}, "442 of 450"),
        ({}, {"correct": 438}, "438 of 450"),
    ],
)
def test_each_claim_can_fail(framework: str, neuron: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    (failure,) = demo.failed(outcome(framework, neuron, **changes))
    assert failure.startswith(f"{framework}: ")
    assert said in failure


@pytest.mark.parametrize(
    ("neuron", "changes"), [({"forward": "rounding"}, {}), ({"spike_mismatches": 1}, {}), ({}, {"correct": 441})]
)
def test_native_is_held_to_more_than_sinabs(neuron: dict[str, Any], changes: dict[str, Any]) -> None:
    assert len(demo.failed(outcome("tracetorch", neuron, **changes))) == 1
    assert demo.failed(outcome("sinabs", neuron, **changes)) == []


def test_what_holds_fails_nowhere() -> None:
    assert demo.failed(outcome("tracetorch")) == []
    assert demo.failed(outcome("sinabs", {"forward": "rounding", "spike_mismatches": 10})) == []


def test_a_number_that_is_not_finite_is_null_in_the_json() -> None:
    facts = demo.summary([outcome("sinabs", {"gradient_error": math.inf})], ["x"], demo.QUICK)
    assert facts["targets"]["sinabs"]["gradient_error"] is None
    assert json.loads(json.dumps(facts, allow_nan=False))["ok"] is False


# ---------------------------------------------------------------- when it cannot run


@pytest.mark.parametrize("name", demo.EXTRAS)
def test_a_missing_extra_is_named_with_its_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert name in printed.err
    assert "pip install -e '.[demo,snntorch,sinabs]'" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 2
    assert "remedy: another --out" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps=0", "--epochs=-1", "--steps=many"])
def test_a_wrong_option_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", option])
    assert stop.value.code == 2
    assert "is not a positive whole number" in capsys.readouterr().err
