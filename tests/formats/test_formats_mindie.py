"""MindIE's hotspot dumps: counters by NPU, phases, places of experts, damage."""

import gzip
import json

import numpy as np
import pytest
from dumps import mindie

from moetrace import LoadTrace, TraceError, read_trace


def edited(folder, **changes):
    """The dump with other values in its configuration; None takes one out."""
    path = folder / "decode" / "model_gen_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def test_what_was_assumed_is_said(small, tmp_path):
    """Ranks, counters, the meaning of a step, and top-k from the configuration."""
    found = read_trace(mindie(small, tmp_path))

    said = " ".join(found.info.assumptions)
    for part in ("2 ranks of decode", "counters only grow", "one in 8", "numbered from 0"):
        assert part in said
    assert 2 == found.info.top_k


def test_the_folder_of_a_phase_is_a_dump_too(small, tmp_path):
    """The inner folder gives the same counts as the outer one."""
    assert np.array_equal(small.counts, read_trace(mindie(small, tmp_path) / "decode").counts)


def test_prefill_and_decode_are_not_mixed(small, tmp_path):
    """With both phases there one has to be chosen."""
    folder = mindie(small, tmp_path)
    (folder / "prefill").mkdir()
    for child in (folder / "decode").iterdir():
        (folder / "prefill" / child.name.replace("decode", "prefill")).write_bytes(child.read_bytes())

    with pytest.raises(TraceError, match=r"prefill and decode.*--phase"):
        read_trace(folder)
    assert np.array_equal(small.counts, read_trace(folder, format="mindie:phase=prefill").counts)


def test_matrices_that_not_every_rank_has_are_left_out(small, tmp_path):
    """A rank that was stopped earlier, amid a matrix, ends the trace, and that is said."""
    folder = mindie(small, tmp_path)
    path = folder / "decode" / "decode_1.csv"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: 2 * 40 + 1]))

    found = read_trace(folder)

    assert np.array_equal(small.counts[:40], found.counts)
    assert any("first 40 matrices are taken" in text for text in found.info.assumptions)


def test_places_of_experts_are_added_up_by_their_map(tmp_path):
    """Redundant and moved experts count for the logical one; shared experts and their devices do not count."""
    rng = np.random.default_rng(0)
    logical = rng.multinomial(50, [0.5, 0.3, 0.2], size=(6, 1))  # (steps, layers, experts)
    half = logical[:, :, 0] // 2
    # Device 0 holds shared experts alone, device 1 experts 2 and 0, device 2 experts 1, 0 and the shared one, 3.
    columns = [[half[:, 0] * 0 + 99], [logical[:, 0, 2], half[:, 0]],
               [logical[:, 0, 1], logical[:, 0, 0] - half[:, 0], logical[:, 0].sum(axis=1)]]  # fmt: skip
    for rank, counts in enumerate(columns):
        rows = np.stack(counts, axis=1).cumsum(axis=0)
        (tmp_path / f"decode_{rank}.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows.tolist()))
    config = {"num_moe_layers": 1, "num_of_experts": 3, "num_dangling_shared_experts": 1,
              "eplb_expert_map_file": "/served/from/map.json"}  # fmt: skip
    (tmp_path / "model_gen_config.json").write_text(json.dumps(config))

    with pytest.raises(TraceError, match=r"'map\.json', which is not in the folder.*--accept physical"):
        read_trace(tmp_path)
    devices = [{"device_id": i, "device_expert": experts} for i, experts in enumerate([[0], [2, 0], [1, 0, 3]])]
    (tmp_path / "map.json").write_text(json.dumps({"layer_list": [{"layer_id": 0, "device_list": devices[::-1]}]}))
    found = read_trace(tmp_path)
    assert np.array_equal(logical, found.counts)
    assert any("1 places of shared ones left out" in text for text in found.info.assumptions)


def test_columns_without_a_map_are_physical_experts(small, tmp_path):
    """More columns than experts, and nothing says which they hold."""
    with pytest.raises(TraceError, match=r"4 columns for 3 experts.*--accept physical"):
        read_trace(edited(mindie(small, tmp_path), num_of_experts=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_moe_layers": None}, "says num_moe_layers: None; it is a whole number from 1 to 10,000"),
        ({"num_moe_layers": 0}, "says num_moe_layers: 0"),
        ({"num_moe_layers": "many"}, "says num_moe_layers: 'many'"),
        ({"num_moe_layers": 2.9}, "says num_moe_layers: 2.9"),
        ({"num_moe_layers": True}, "says num_moe_layers: True"),
        ({"num_moe_layers": 5000}, "no matrix of 5000 layers"),
        ({"collection_Interval": -8}, "says collection_Interval: -8"),
        ({"collection_Interval": 10**30}, "says collection_Interval: 1000"),
        ({"num_of_selected_experts": [-3]}, "says num_of_selected_experts: -3"),
        ({"eplb_expert_map_file": "a\nb"}, r"placed by 'a\\nb', which is not in the folder"),
        ({"num_dangling_shared_experts": 2}, "no ranks but those of shared experts"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(small, tmp_path, changes, message):
    """Every number of the configuration is checked before it is used."""
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(edited(mindie(small, tmp_path), **changes))
    assert "\n" not in str(caught.value)


def layers_of(*layers):
    """A placement: for each layer the experts of each device, in order."""
    return [
        {"layer_id": i, "device_list": [{"device_id": d, "device_expert": e} for d, e in enumerate(devices)]}
        for i, devices in enumerate(layers)
    ]


FITS = [[0, 1], [2, 3]]
MAPS = [
    [1],
    {},
    {"layer_list": 3},
    {"layer_list": []},
    {"layer_list": [{"layer_id": 0}]},
    {"layer_list": layers_of(FITS)},
    {"layer_list": layers_of(FITS, FITS, FITS)},
    {"layer_list": [layers_of(FITS)[0]] * 2},
    {"layer_list": layers_of(FITS, [[0, 1, 2, 3]])},
    {"layer_list": layers_of(FITS, [[0, 1, 2], [3]])},
    {"layer_list": layers_of(FITS, [[0, 1], [2, 1.9]])},
    {"layer_list": layers_of(FITS, [[0, 1], [2, True]])},
    {"layer_list": layers_of(FITS, [[0, 1], [2, -1]])},
]


@pytest.mark.parametrize("table", MAPS)
def test_a_map_that_is_none_is_refused(small, tmp_path, table):
    """A placement of another shape ends in one line with its name."""
    folder = edited(mindie(small, tmp_path), eplb_expert_map_file="map.json")
    (folder / "decode" / "map.json").write_text(json.dumps(table))

    with pytest.raises(TraceError, match=r"map\.json"):
        read_trace(folder)


def test_a_counter_that_falls_is_named(small, tmp_path):
    """Counters that were reset give no counts for the passes between."""
    counters = np.concatenate([small.counts[:3].cumsum(axis=0), small.counts[3:4]])
    fallen = LoadTrace.from_counts(np.diff(counters, axis=0, prepend=0).clip(0) + 1, name="any")
    folder = mindie(fallen, tmp_path)
    path = folder / "decode" / "decode_0.csv"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[:6], "1,1", "1,1"]) + "\n")

    with pytest.raises(TraceError, match=r"decode_0\.csv, row 6, column 0: a counter falls"):
        read_trace(folder)


def test_a_damaged_rank_points_to_its_copy(small, tmp_path):
    """MindIE keeps a copy of every file; a row of another width says so."""
    folder = mindie(small, tmp_path)
    path = folder / "decode" / "decode_0.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:9], "7", *lines[10:]]) + "\n")

    with pytest.raises(TraceError, match=r"decode_0\.csv: cannot be read.*decode_0_bak\.csv may be whole"):
        read_trace(folder)


@pytest.mark.parametrize("cell", ["", "1.5", "-3", "many", "true", "2026-01-01", "10000000000000000000000"])
def test_a_cell_that_is_no_count_is_named(small, tmp_path, cell):
    """Nulls, fractions, negative numbers and text end in one line."""
    folder = mindie(small, tmp_path)
    path = folder / "decode" / "decode_1.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:9], f"{cell},{lines[9].split(',')[1]}", *lines[10:]]) + "\n")

    with pytest.raises(TraceError, match=r"decode_1\.csv"):
        read_trace(folder)


def test_a_blank_line_shifts_nothing(tmp_path):
    """With one expert on each NPU a blank line is a missing counter, not one row less."""
    one = LoadTrace.from_counts(np.random.default_rng(0).integers(1, 9, (20, 2, 2)))
    folder = mindie(one, tmp_path)
    path = folder / "decode" / "decode_0.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:7], "", *lines[7:]]) + "\n")

    with pytest.raises(TraceError, match=r"decode_0\.csv"):
        read_trace(folder)


def test_a_last_row_that_does_not_end_is_left_out_and_said(small, tmp_path):
    """Its last number may be cut."""
    folder = mindie(small, tmp_path)
    path = folder / "decode" / "decode_0.csv"
    path.write_bytes(path.read_bytes().rstrip())

    found = read_trace(folder)

    assert np.array_equal(small.counts[:-1], found.counts)
    assert any("the first 59 matrices are taken" in text for text in found.info.assumptions)


def test_many_columns_are_refused_before_they_are_read(tmp_path):
    """A line of commas would take any amount of memory."""
    config = {"num_moe_layers": 1, "num_of_experts": 8}
    (tmp_path / "model_gen_config.json").write_text(json.dumps(config))
    (tmp_path / "decode_0.csv").write_text(",".join(["1"] * 200_000) + "\n")

    with pytest.raises(TraceError, match=r"decode_0\.csv: has 200,000 columns"):
        read_trace(tmp_path)


def test_ranks_are_read_in_small_pieces(tmp_path):
    """All of them are open at once, so what each hands on stays small whatever the map."""
    from moetrace.formats.readers import mindie as module

    many = LoadTrace.from_counts(np.random.default_rng(0).integers(1, 9, (3000, 2, 64)))
    reading = module.MindieFormat().read(mindie(many, tmp_path)).parts[0]

    assert max(len(piece.step) for piece in reading.cells()) <= module.RANK_CELLS


def test_missing_ranks_are_missing_experts(small, tmp_path):
    """Without the last rank there are columns missing, which is no matter of places."""
    folder = mindie(small, tmp_path)
    (folder / "decode" / "decode_1.csv").unlink()

    with pytest.raises(TraceError, match="has 2 columns in 1 ranks for 4 experts; gather the files of all machines"):
        read_trace(folder)


def test_a_cut_archive_is_named(small, tmp_path):
    """A compressed rank of which the end is missing."""
    folder = mindie(small, tmp_path)
    path = folder / "decode" / "decode_1.csv"
    path.write_bytes(gzip.compress(path.read_bytes())[:-50])

    with pytest.raises(TraceError, match=r"decode_1\.csv: cannot be read"):
        read_trace(folder)


def test_a_missing_rank_is_named(small, tmp_path):
    """Ranks have numbers without holes."""
    folder = mindie(small, tmp_path)
    (folder / "decode" / "decode_1.csv").rename(folder / "decode" / "decode_2.csv")

    with pytest.raises(TraceError, match="rank 1 is missing"):
        read_trace(folder)
