"""SGLang's own code that reads a plan, without the GPU that all of SGLang needs.

Its wheel is installed without what it depends on. The modules that read, plan and dispatch run as they are; what they
ask of a server that has started (its settings, its model, its other processes) is answered here.
"""

import importlib
import importlib.util
import sys
from argparse import ArgumentParser
from types import ModuleType, SimpleNamespace

WHEEL = importlib.util.find_spec("sglang")


def loader(monkeypatch, flags, layers, experts, *, nodes=1, dispatch="static", backend="deepep"):
    """The module ``sglang.srt.eplb.expert_location`` of a server that was started with *flags*.

    Its model has so many *layers* and *experts*; *dispatch* and *backend* are SGLang's ``--ep-dispatch-algorithm`` and
    ``--moe-a2a-backend``.
    """
    given = _parsed(flags)
    moe = SimpleNamespace(
        init_expert_location=given.init_expert_location,
        ep_num_redundant_experts=given.ep_num_redundant_experts,
        ep_dispatch_algorithm=dispatch,
        moe_a2a_backend=backend,
        eplb_algorithm="auto",
        ep_join_mode=None,
    )
    parallel = SimpleNamespace(ep_size=given.ep_size, tp_size=given.ep_size, nnodes=nodes, elastic_ep_initial_size=None)
    answers = {
        "sglang": _package(""),
        "sglang.srt": _package("srt"),
        "sglang.srt.runtime_context": SimpleNamespace(
            get_device=lambda: SimpleNamespace(device="cpu"),
            get_exec=lambda: SimpleNamespace(moe=moe),
            get_parallel=lambda: parallel,
            get_resources=lambda: None,
        ),
        "sglang.srt.elastic_ep": ModuleType("sglang.srt.elastic_ep"),
        "sglang.srt.elastic_ep.elastic_ep": SimpleNamespace(elastic_expanded_world_enabled=lambda: False),
    }
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    for name, answer in answers.items():
        monkeypatch.setitem(sys.modules, name, answer)
    module = importlib.import_module("sglang.srt.eplb.expert_location")
    model = module.ModelConfigForExpertLocation(num_layers=layers, num_logical_experts=experts)
    monkeypatch.setattr(module.ModelConfigForExpertLocation, "from_model_config", staticmethod(lambda _: model))
    return module


def _parsed(flags):
    """The *flags* as SGLang's own parser takes them: whole numbers, and a path."""
    parser = ArgumentParser(allow_abbrev=False)
    for name in ("--init-expert-location", "--ep-dispatch-algorithm"):
        parser.add_argument(name)
    for name in ("--ep-size", "--ep-num-redundant-experts"):
        parser.add_argument(name, type=int)
    return parser.parse_args(flags.split())


def _package(folder):
    """A package of the wheel whose modules are found, while what it does when it is imported is not done."""
    package = ModuleType(".".join(["sglang", folder]).rstrip("."))
    package.__path__ = [f"{WHEEL.submodule_search_locations[0]}/{folder}".rstrip("/")]
    return package
