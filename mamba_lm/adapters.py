"""Adapters (LoRA and others) on a language model, by peft: add, save, load, merge.

peft puts a wrapper in a module's place. The model calls it wherever it called the module, and
leaves all kernels that would read the raw weights. A model with an adapter is saved in one of two
forms: merged, by `checkpoint.save_model`, or the adapter alone, by `save_adapter`.

peft itself reads these folders too: `PeftModel.from_pretrained(load_model(...), folder)`.
"""

import copy
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.atomic_files import atomic_folder
from common.errors import UserError
from mamba_lm.folders import find_folder
from mamba_lm.foreign_files import parsing, read_foreign_object
from mamba_lm.formats.weights import WeightFiles, read_weights, write_tensors
from mamba_lm.models.interface import LanguageModel, ModelConfig

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in peft's files
_REFUSALS = (NotImplementedError, ValueError)  # peft's, of an adapter that it cannot make or merge


def add_adapter(model: LanguageModel, config: "PeftConfig") -> None:
    """Put an adapter on a model, in place: its weights alone then require gradients.

    Raises UserError, and leaves the model as it was, where a target matches nothing, peft refuses
    the config, an adapter's weight would have no effect, or the model has an adapter already.
    """
    from peft import inject_adapter_in_model

    if has_adapter(model):
        raise UserError("the model has an adapter already: merge it first")
    config = copy.deepcopy(config)
    _require_targets(model, config)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        try:
            inject_adapter_in_model(config, model)
        except _REFUSALS as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"peft refuses the adapter: {reason}") from error
        unused = _find_unused(model, set(before))
        if unused:
            raise UserError(
                f"the adapter's weights {', '.join(unused[:3])} have no effect on what the model "
                "computes; choose other targets"
            )
    except BaseException:
        _unwrap(model, merge=False)
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
        raise


def has_adapter(model: nn.Module) -> bool:
    """Whether a module of the model is wrapped by peft."""
    return bool(_find_wrappers(model))


def save_adapter(model: LanguageModel, folder: str | Path) -> None:
    """Write the adapter alone, without the model's own weights, complete or not at all. UserError
    where the model has not exactly one adapter, or the folder contains a model."""
    from peft import get_peft_model_state_dict

    folder, names = Path(folder), list(getattr(model, "peft_config", ()))
    if len(names) != 1:
        raise UserError(f"{folder}: the model has {len(names)} adapters; one can be saved")
    if (folder / "config.json").exists():
        raise UserError(f"{folder}: contains a model; save the adapter to a folder of its own")
    config = copy.copy(model.peft_config[names[0]])
    config.inference_mode = True
    weights = get_peft_model_state_dict(model, adapter_name=names[0], save_embedding_layers=False)
    weights = {
        _PREFIX + name.removeprefix(_PREFIX): value.detach().cpu().contiguous().clone()
        for name, value in weights.items()
    }
    with atomic_folder(folder, (CONFIG, WEIGHTS)) as partial:
        write_tensors(weights, partial / WEIGHTS)
        config.save_pretrained(partial)


def load_adapter(model: LanguageModel, name: str | Path, is_trainable: bool = False) -> None:
    """Put an adapter from a folder, or from the Hub, on the model that it was trained on, in place.

    Raises UserError, and leaves the model as it was, where files are missing or broken or do not
    fit the model, and where `add_adapter` does.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    folder = find_folder(str(name))
    path = folder / CONFIG
    read_foreign_object(path)
    weights = read_weights(WeightFiles((folder / WEIGHTS,)))
    weights = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
    with parsing(lambda reason: f"{path}: not an adapter's config ({reason})"):
        config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    add_adapter(model, config)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {key: value.shape for key, value in expected.items()}
    if shapes != {key: value.shape for key, value in weights.items()}:
        _unwrap(model, merge=False)
        odd = sorted(
            key
            for key in {*shapes, *weights}
            if key not in weights or shapes.get(key) != weights[key].shape
        )
        raise UserError(
            f"{folder / WEIGHTS}: does not fit the model and {CONFIG}: {', '.join(odd[:3])}"
        )
    set_peft_model_state_dict(model, weights)


def merge_adapter(model: LanguageModel) -> None:
    """Add the active adapter to the model's own weights, in place: the model is plain again, and
    all its weights require gradients.

    A tied head and embedding of which one was adapted are two weights afterwards. Raises UserError,
    and leaves the model as it was, where peft cannot merge, as with LoRA on the convolution.
    """
    for name, wrapper in _find_wrappers(model).items():
        _merge(name, copy.deepcopy(wrapper))  # or a refusal would leave a model that is half merged
    _unwrap(model, merge=True)
    model.requires_grad_(True)


def merged_weights(model: LanguageModel) -> tuple[dict[str, Tensor], ModelConfig]:
    """The weights and the config of the plain model that computes what this one does, which stays
    as it is. UserError as by `merge_adapter`."""
    if has_adapter(model):
        model = copy.deepcopy(model)
        _unwrap(model, merge=True)
    return model.state_dict(), model.config


def _find_wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """peft's wrappers by the names of the modules in whose places they are, outer ones first."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    wrappers: dict[str, nn.Module] = {}
    trained = ()  # prefixes of modules that are trained themselves: peft unwraps what is in them
    for name, module in model.named_modules():
        if not name.startswith(trained):
            if isinstance(module, AuxiliaryTrainingWrapper):
                trained = (*trained, f"{name}.")
            if isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
                wrappers[name] = module
    return wrappers


def _unwrap(model: LanguageModel, merge: bool) -> None:
    """Put every wrapped module back, with the weights of active adapters if they are to merge."""
    wrappers = _find_wrappers(model)
    ends = {"lm_head", "backbone.embeddings"} & wrappers.keys()
    if merge and model.config.tie_embeddings and ends:
        head = _inner(model.lm_head)
        head.weight = nn.Parameter(head.weight.detach().clone())
    for name in reversed(wrappers):  # inner ones first
        if merge:
            _merge(name, wrappers[name])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _unwrapped(wrappers[name], merge))
    if hasattr(model, "peft_config"):
        del model.peft_config
    if merge and model.config.tie_embeddings and ends:
        head, embeddings = model.lm_head, model.backbone.embeddings
        if torch.equal(head.weight, embeddings.weight):
            head.weight = embeddings.weight
        else:
            model.config = dataclasses.replace(model.config, tie_embeddings=False)


def _merge(name: str, wrapper: nn.Module) -> None:
    """Bring the wrapped module's weights to what the wrapper computes."""
    if not _is_adapter(wrapper):
        return
    try:
        if not wrapper.disable_adapters:
            wrapper.merge()
        elif wrapper.merged:
            wrapper.unmerge()
    except _REFUSALS as error:
        raise UserError(
            f"{name}: peft cannot merge its adapter ({error}); save the adapter alone"
        ) from error


def _unwrapped(wrapper: nn.Module, merge: bool) -> nn.Module:
    if _is_adapter(wrapper):
        return wrapper.base_layer
    return wrapper.unload_and_optionally_merge_module(
        merge=merge and not wrapper.disable_adapters, safe_merge=False, adapter_names=None
    )


def _is_adapter(wrapper: nn.Module) -> bool:
    """Whether it adds to a module, rather than train a copy of it, or of some of its rows."""
    return "base_layer" in vars(wrapper)["_modules"]


def _inner(module: nn.Module) -> nn.Module:
    """The model's own module, which may be wrapped several times."""
    while inner := vars(module)["_modules"].get("base_layer"):
        module = inner
    return vars(module)["_modules"].get("original_module", module)


def _require_targets(model: LanguageModel, config: "PeftConfig") -> None:
    """UserError where there is no target, or one of several matches nothing, which peft ignores,
    or where an adapter needs more than token ids."""
    if getattr(config, "alora_invocation_tokens", None):
        raise UserError("alora_invocation_tokens: the model does not pass their places to peft")
    if getattr(config, "target_modules", ()) is None:
        if not getattr(config, "target_parameters", None):
            raise UserError("the adapter's config has no target_modules, such as in_proj, out_proj")
        config.target_modules = []  # or peft would look for the defaults of a model_type
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    fields = {
        "target_modules": modules,
        "modules_to_save": modules,
        "target_parameters": parameters,
    }
    for field, names in fields.items():
        targets = getattr(config, field, None) or ()
        for target in [] if isinstance(targets, str) else sorted(targets):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                known = sorted({name.rpartition(".")[2] for name in names if name})
                raise UserError(
                    f"{field}: {target!r} matches nothing in the model; it has "
                    f"{', '.join(name for name in known if not name.isdigit())}"
                )


def _find_unused(model: LanguageModel, before: set[nn.Parameter]) -> list[str]:
    """Names of the weights that came with an adapter and that no output depends on."""
    added = {name: p for name, p in model.named_parameters() if p not in before}
    required = {p: p.requires_grad for p in added.values()}
    for parameter in added.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            logits, _ = model(torch.zeros(1, 2, dtype=torch.long, device=model.device))
            if not logits.requires_grad:
                return list(added)
            gradients = torch.autograd.grad(logits.sum(), list(added.values()), allow_unused=True)
    finally:
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
    return [name for name, gradient in zip(added, gradients, strict=True) if gradient is None]
