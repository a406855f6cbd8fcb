"""TensorBoard's event files in the forms that its writers have: order of tags, vectors, folders of `add_scalars`."""

import numpy as np
import pytest
from dumps import scalars

from moetrace import TraceError, read_trace


def logged(trace, folder, tag):
    """A scalar for each layer and expert, called by *tag*, with a loss among them."""
    rows = [
        (
            step,
            {
                "loss": 0.5,
                "lr/group_0/expert_lr": 0.1,
                **{
                    tag.format(layer=layer, expert=expert): float(trace.counts[i, j, expert])
                    for j, layer in enumerate(trace.layers)
                    for expert in range(trace.experts)
                },
            },
        )
        for i, step in enumerate(trace.steps.tolist())
    ]
    return scalars(folder, rows)


@pytest.mark.parametrize(
    "tag",
    [
        "moe/expert_{expert}/layer_{layer}",
        "experts/{expert}/layers.{layer}/load",
        "model.layers.{layer}.mlp.experts.{expert}",
        "moe-expert/tokens_layer{layer}_expert{expert}",
    ],
)
def test_layer_and_expert_come_in_either_order(small, tmp_path, tag):
    """By the same patterns as columns."""
    found = read_trace(logged(small, tmp_path / "runs", tag))

    assert np.array_equal(small.counts, found.counts)
    assert small.layers == found.layers


def test_where_no_tag_matches_some_are_shown_and_a_pattern_that_does(small, tmp_path):
    """Following the line is enough."""
    folder = logged(small, tmp_path / "runs", "L{layer}.load.{expert}")

    with pytest.raises(TraceError, match=r"there are L#\.load\.#, loss, lr/group_#/expert_lr") as caught:
        read_trace(folder)
    pattern = str(caught.value).partition("--pattern '")[2].rstrip("'")
    assert np.array_equal(small.counts, read_trace(folder, format=f":pattern={pattern}").counts)


def vectors(trace, folder, tag, data=None):
    """A tensor summary of the counts of a layer, as `tf.summary.write` makes them."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = EventFileWriter(str(folder))
    for i, step in enumerate(trace.steps.tolist()):
        values = [
            Summary.Value(tag=tag.format(layer=layer), tensor=make_tensor_proto((data or trace.counts)[i, j]))
            for j, layer in enumerate(trace.layers)
        ]
        writer.add_event(Event(step=step, summary=Summary(value=values)))
    writer.close()
    return folder


@pytest.mark.parametrize("tag", ["moe/layer_{layer}/tokens_per_expert", "model.layers.{layer}.mlp.load"])
def test_vectors_are_the_experts_of_a_layer(small, tmp_path, tag):
    """The layer by the tag."""
    found = read_trace(vectors(small, tmp_path / "runs", tag))

    assert np.array_equal(small.counts, found.counts)
    assert small.layers == found.layers


def test_a_pattern_for_vectors_names_the_layer_alone(small, tmp_path):
    """Their experts have no names."""
    folder = vectors(small, tmp_path / "runs", "load-of-{layer}")

    with pytest.raises(TraceError, match="load-of-#"):
        read_trace(folder)
    assert np.array_equal(small.counts, read_trace(folder, format=r":pattern=of-(?P<layer>\d+)").counts)


@pytest.mark.parametrize(("main", "key"), [("load/layer_{layer}", "expert_{expert}"), ("load", "layer_{layer}_expert_{expert}"),
                                           ("load/expert_{expert}", "layer_{layer}")])  # fmt: skip
def test_folders_of_add_scalars_are_one_run(small, tmp_path, main, key):
    """Each scalar in a folder named after it, all with the tag they were added under."""
    small = small.select(last=19)
    for j, layer in enumerate(small.layers):
        for expert in range(small.experts):
            names = {"layer": layer, "expert": expert}
            tag = main.format(**names)
            folder = tmp_path / "runs" / f"{tag.replace('/', '_')}_{key.format(**names)}"
            rows = [(s, {tag: float(small.counts[i, j, expert])}) for i, s in enumerate(small.steps.tolist())]
            scalars(folder, rows)
    scalars(tmp_path / "runs", [(1, {"loss": 1.0})])

    found = read_trace(tmp_path / "runs")

    assert np.array_equal(small.counts, found.counts)


def test_the_folders_are_those_that_torch_makes(small, tmp_path):
    """By its own writer, where it is installed."""
    pytest.importorskip("torch")
    from torch.utils.tensorboard import SummaryWriter

    small = small.select(last=12)
    writer = SummaryWriter(str(tmp_path / "runs"))
    for i, step in enumerate(small.steps.tolist()):
        for j, layer in enumerate(small.layers):
            counts = {f"expert_{e}": int(n) for e, n in enumerate(small.counts[i, j])}
            writer.add_scalars(f"moe/layer_{layer}", counts, step)
    writer.close()

    assert np.array_equal(small.counts, read_trace(tmp_path / "runs").counts)
