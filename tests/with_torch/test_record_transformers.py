"""Recording Transformers models: the counts are those of the model's own routing, exactly."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from moetrace import TraceError, open_trace
from moetrace.record import Recorder
from moetrace.record.transformers import recorder_callback, watch

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def mixtral(**settings):
    """A tiny Mixtral of random weights, the same each time."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=4, output_router_logits=True, **settings))


def qwen2_moe():
    """A tiny Qwen2-MoE, with a dense layer between two of experts."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **TINY, num_experts=6, moe_intermediate_size=8, shared_expert_intermediate_size=8, mlp_only_layers=[1]
        )
    )


def qwen3_moe():
    """A tiny Qwen3-MoE."""
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, num_experts=6, moe_intermediate_size=8, head_dim=8))


def gpt_oss():
    """A tiny GPT-OSS."""
    return GptOssForCausalLM(GptOssConfig(**TINY, num_local_experts=6, head_dim=8))


def olmoe():
    """A tiny OLMoE."""
    return OlmoeForCausalLM(OlmoeConfig(**TINY, num_experts=8))


def deepseek_v3():
    """A tiny DeepSeek-V3: groups of experts, a bias, and the first layer dense."""
    config = DeepseekV3Config(
        **TINY,
        n_routed_experts=8,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    model = DeepseekV3ForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(0, 0.5, 8))
    return model


def batch(seed, rows=3, tokens=10):
    """Random tokens (rows, tokens)."""
    return torch.randint(1, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def own_routing(logits, experts=4, keep=None):
    """Counts (layers, experts) from a Mixtral's own router logits, tokens with false in *keep* left out."""
    rows = []
    for layer in logits:
        chosen = layer.softmax(-1).topk(2).indices  # (tokens, 2)
        chosen = chosen if keep is None else chosen[keep.reshape(-1)]
        rows.append(np.bincount(chosen.reshape(-1).numpy(), minlength=experts))
    return np.stack(rows)


def test_twenty_lines_record_a_mixtral(tmp_path):
    """What a user writes; each step's counts are those of the router's own logits."""
    model = mixtral()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with Recorder(tmp_path / "run.parquet", model="tiny Mixtral", top_k=2) as recorder:
        watching = watch(model, recorder)
        for seed in range(5):
            output = model(batch(seed), labels=batch(seed))
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watching.step()
            expected.append(own_routing(output.router_logits))
    trace = open_trace(tmp_path / "run.parquet")

    assert np.array_equal(np.stack(expected), trace.counts)
    assert ((0, 1, 2), 60) == (trace.layers, trace.info.tokens_per_step)
    assert [1, 2, 3, 4, 5] == trace.steps.tolist()


LAYERS = {
    mixtral: (0, 1, 2),
    qwen2_moe: (0, 2),
    qwen3_moe: (0, 1, 2),
    olmoe: (0, 1, 2),
    gpt_oss: (0, 1, 2),
    deepseek_v3: (1, 2),
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # the new name is from 5.x on
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at it
@pytest.mark.parametrize(
    ("build", "way"),
    [(build, way) for build in LAYERS for way in ("plain", "reentrant", "not reentrant")]
    + [(build, "compiled") for build in (mixtral, gpt_oss)],  # the others pass as well, and take half a minute each
)
def test_the_experts_really_chosen_are_counted(tmp_path, build, way):
    """By the indices of each model's router, also where a bias or groups decide: two micro-batches, evaluation between."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, given = build(), []
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if type(module).__name__.lower().endswith("router"):
            module.register_forward_hook(lambda _module, _args, output: given.append(output[2]))
    if "reentrant" in way:
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
        model.enable_input_require_grads()
    with Recorder(tmp_path / "run.parquet") as recorder:
        watching = watch(model, recorder)
        called = torch.compile(model, backend="eager") if way == "compiled" else model
        for seed in (0, 1):
            called(batch(seed), labels=batch(seed), use_cache=False).loss.backward()
            plain(batch(seed), use_cache=False)
            model.eval()
            with torch.no_grad():
                called(batch(2), use_cache=False)
            model.train()
        watching.step()
    trace = open_trace(tmp_path / "run.parquet")

    assert LAYERS[build] == trace.layers
    counts = [np.bincount(chosen.reshape(-1).numpy(), minlength=trace.experts) for chosen in given]
    assert np.array_equal(np.stack(counts).reshape(2, len(trace.layers), -1).sum(axis=0), trace.counts[0])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # the new name is from 5.x on
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_counted_twice(tmp_path, reentrant):
    """Activation checkpointing, two micro-batches a step: the same counts as without it."""
    plain, model = mixtral(), mixtral()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    expected = sum(own_routing(plain(batch(seed)).router_logits) for seed in (0, 1))
    with Recorder(tmp_path / "run.parquet") as recorder:
        watching = watch(model, recorder)
        for seed in (0, 1):
            model(batch(seed), labels=batch(seed), use_cache=False).loss.backward()
        watching.step()

    assert np.array_equal(expected, open_trace(tmp_path / "run.parquet").counts[0])


def test_padding_is_left_out(tmp_path):
    """Tokens masked as padding do not count, on either side; with `padding=True` they do."""
    model = mixtral()
    keep = torch.ones(3, 10, dtype=torch.long)
    keep[0, 7:] = 0
    keep[2, :4] = 0
    logits = model(batch(0), attention_mask=keep).router_logits
    for padding in (False, True):
        with Recorder(tmp_path / f"{padding}.parquet") as recorder, watch(model, recorder, padding=padding) as watching:
            model(batch(0), keep)
            watching.step()

    assert np.array_equal(own_routing(logits, keep=keep == 1), open_trace(tmp_path / "False.parquet").counts[0])
    assert np.array_equal(own_routing(logits), open_trace(tmp_path / "True.parquet").counts[0])


class Wrapper(torch.nn.Module):
    """A model that passes on whatever it is called with, as adapters do."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, *args, **kwargs):
        """As the model within."""
        return self.model(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # the new name is from 5.x on
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("form", ["2-D", "4-D bool", "4-D float"])
@pytest.mark.parametrize("called", ["model", "inner", "wrapped", "wrapped by position"])
def test_padding_is_left_out_however_the_mask_is_given(form, called, reentrant):
    """By position or by name, for tokens or pairs of them, to the model, a part of it or a wrapper; recomputed or not."""
    model = mixtral()
    model.config.output_router_logits = False
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    keep = torch.ones(3, 10, dtype=torch.long)
    keep[0, 7:] = 0
    keep[2, 6:] = 0
    pairs = (torch.ones(10, 10).tril().bool() & (keep[:, None, :] != 0))[:, None]
    biases = torch.zeros(pairs.shape).masked_fill(~pairs, torch.finfo(torch.float32).min)
    mask = {"2-D": keep, "4-D bool": pairs, "4-D float": biases}[form]
    whole = Wrapper(model) if called.startswith("wrapped") else model
    watching = watch(whole, None)
    given = (mask,) if "position" in called else ()
    output = (model.model if called == "inner" else whole)(
        batch(0), *given, use_cache=False, **({} if given else {"attention_mask": mask})
    )
    output[0].sum().backward()

    assert [2 * int(keep.sum())] * 3 == [int(counts.sum()) for counts in watching._counts.values()]


def test_a_mask_holds_for_its_own_call():
    """The next call without one has no padding."""
    model = mixtral()
    watching = watch(model, None)
    model(batch(0), attention_mask=torch.ones(3, 10, dtype=torch.long).tril())
    real = int(watching._counts[0].sum())
    model(batch(1))

    assert 60 == int(watching._counts[0].sum()) - real


def test_a_mask_that_cannot_be_read_is_assumed(tmp_path):
    """What it marks as padding counts, and the trace says so."""
    path = tmp_path / "run.parquet"
    model = Wrapper(mixtral())
    model.forward = lambda tokens, attention_mask: model.model(tokens)  # noqa: ARG005
    with Recorder(path) as recorder:
        watching = watch(model, recorder)
        model(batch(0), attention_mask={"full_attention": None, "sliding_attention": None})
        watching.step()

    assert any(
        "padding is counted: an attention mask of type dict" in text for text in open_trace(path).info.assumptions
    )


def test_evaluation_is_not_counted(tmp_path):
    """Passes in eval mode or without gradients between training passes leave no trace."""
    model = mixtral()
    expected = own_routing(model(batch(0)).router_logits)
    with Recorder(tmp_path / "run.parquet") as recorder:
        watching = watch(model, recorder)
        model(batch(0))
        model.eval()
        model(batch(1))
        model.train()
        with torch.no_grad():
            model(batch(2))
        watching.step()

    assert np.array_equal(expected, open_trace(tmp_path / "run.parquet").counts[0])


def test_serving_is_counted_when_asked_for(tmp_path):
    """With `evaluation=True` passes without gradients are steps; without, the error says so."""
    model = mixtral().eval()
    with Recorder(tmp_path / "run.parquet") as recorder, watch(model, recorder, evaluation=True) as watching:
        logits = model(batch(0)).router_logits
        watching.step()
    silent = watch(model, None)
    model(batch(0))

    assert np.array_equal(own_routing(logits), open_trace(tmp_path / "run.parquet").counts[0])
    with pytest.raises(TraceError, match="evaluation=True"):
        silent.step()


class LogitsOnly(torch.nn.Module):
    """A model that gives back router logits and shows no router."""

    def __init__(self):
        super().__init__()
        self.inner = [mixtral()]  # in a list, so that its modules are not seen
        self.config = self.inner[0].config

    def forward(self, input_ids, attention_mask=None):
        """As the model within."""
        return self.inner[0](input_ids, attention_mask=attention_mask)


def test_any_model_with_router_logits_is_counted(tmp_path):
    """Without a known router the top-k of the logits counts, and the trace says so."""
    model = LogitsOnly()
    keep = torch.ones(3, 10, dtype=torch.long)
    keep[1, 5:] = 0
    with Recorder(tmp_path / "run.parquet") as recorder, watch(model, recorder) as watching:
        logits = model(batch(0), keep).router_logits
        watching.step()
    trace = open_trace(tmp_path / "run.parquet")

    assert np.array_equal(own_routing(logits, keep=keep == 1), trace.counts[0])
    assert any("top-2 of router_logits" in assumed for assumed in trace.info.assumptions)


def trainer(tmp_path, callback, steps):
    """A Trainer of two micro-batches a step that saves a checkpoint every second step."""
    data = [{"input_ids": row, "labels": row} for row in batch(0, rows=48)]
    arguments = TrainingArguments(
        str(tmp_path / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(mixtral(), arguments, train_dataset=data, eval_dataset=data[:3], callbacks=[callback])


@pytest.mark.filterwarnings("default")  # whatever the Trainer warns of is not what is tested
def test_the_trainer_records_and_goes_on_from_a_checkpoint(tmp_path):
    """Accumulated, without evaluation; a restart from step 2 replaces step 3."""
    path = tmp_path / "run.parquet"
    trainer(tmp_path, recorder_callback(path, model="tiny"), 3).train()
    first = open_trace(path)
    trainer(tmp_path, recorder_callback(path), 5).train(
        resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-2")
    )
    trace = open_trace(path)

    assert [1, 2, 3] == first.steps.tolist()
    assert [1, 2, 3, 4, 5] == trace.steps.tolist()
    assert 2 * 3 * 10 * 2 == trace.info.tokens_per_step
    assert ["steps 3 to 3 were recorded again after a restart"] == [found.evidence for found in trace.info.findings]


@pytest.mark.filterwarnings("default")
def test_the_trainer_finds_a_batch_size(tmp_path):
    """After a lack of memory it begins again in the same process; the first attempt is given up."""
    path = tmp_path / "run.parquet"
    run = trainer(tmp_path, recorder_callback(path), 4)
    run.args.auto_find_batch_size = True
    step, calls = run.training_step, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("CUDA out of memory.")
        return step(*args, **kwargs)

    run.training_step = failing
    run.train()
    trace = open_trace(path)

    assert [1, 2, 3, 4] == trace.steps.tolist()
    assert 2 * 3 * 10 * 2 > trace.info.tokens_per_step  # two micro-batches of fewer than 3 rows


@pytest.mark.filterwarnings("default")
def test_a_second_training_follows_the_first(tmp_path):
    """Its steps are numbered on, and the trace says where it begins."""
    path = tmp_path / "run.parquet"
    run = trainer(tmp_path, recorder_callback(path), 3)
    run.train()
    run.train()
    trace = open_trace(path)

    assert [1, 2, 3, 4, 5, 6] == trace.steps.tolist()
    assert "from step 4 on the steps are those of another training" in trace.info.assumptions


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("same", [True, False], ids=["same trainer", "another"])
def test_an_interrupted_training_is_resumed_in_its_process(tmp_path, same):
    """After Ctrl-C in a notebook, from a checkpoint; the callback is the same, or a new one of the same path."""
    path = tmp_path / "run.parquet"
    first = trainer(tmp_path, recorder_callback(path), 5)
    step, calls = first.training_step, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    first.training_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.train()
    then = first if same else trainer(tmp_path, recorder_callback(path), 5)
    then.train(resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-2"))
    trace = open_trace(path)

    assert [1, 2, 3, 4, 5] == trace.steps.tolist()
    assert 2 * 3 * 10 * 2 == trace.info.tokens_per_step
