"""Computes the number of layers to keep from a share of layers, parameters, a speedup, or named layers."""

from dataclasses import replace

from transformers import PreTrainedModel

from ..data.sequences import resolve_length
from ..distillation.plan import measure_footprint
from ..errors import LayerPruneError
from ..surgery.decoder import check_next_token, is_sharded
from ..surgery.fresh_model import build_meta_model
from ..surgery.layer_stack import LayerStack
from ..surgery.peft import base_of
from .arguments import TARGETS, Arguments, named_layers, parameter_count


def resolve_target(args: Arguments, model: PreTrainedModel) -> Arguments:
    """Returns the same settings with `target_layers` in place of any other target.

    If `layers` names the layers to remove, all other layers are protected.

    Args:
        args ([`RemovalArguments`]): the settings.
        model (`PreTrainedModel`): the model to prune. It may be on the meta device.

    Raises:
        LayerPruneError: no number of layers fits the target, or the model lacks a named layer.
    """
    if args.target_layers is not None:
        return args
    model = base_of(model)
    stack = LayerStack(model)
    layers, protected = list(stack.layers), args.protected
    name = next(name for name in TARGETS if getattr(args, name) is not None)
    if args.layers is not None:
        protected = _all_but(stack, args)
        target = len(protected)
    elif args.target_ratio is not None:
        target = int(args.target_ratio * len(layers) + 1e-9)  # 0.7 * 10 is less than 7
    elif args.target_speedup is not None:
        target = _layers_for_speedup(model, args.target_speedup)
    else:
        target = _layers_within(model, layers, parameter_count(args.target_parameters))
    if not 1 <= target < len(layers):
        raise LayerPruneError(
            f"{name} is {getattr(args, name)}, which keeps {max(0, target)} of the {len(layers)} layers. "
            f"Choose a value that keeps between 1 and {len(layers) - 1} layers, or set target_layers."
        )
    others: dict[str, None] = dict.fromkeys(TARGETS[1:])
    return replace(args, target_layers=target, protected=protected, **others)


def _all_but(stack: LayerStack, args: Arguments) -> list[int]:
    """Returns the present indices of all layers except the layers to remove.

    Raises:
        LayerPruneError: the model lacks a layer to remove, or the layer is protected.
    """
    kept, named = stack.lineage.kept, named_layers(args.layers)
    unknown = [layer for layer in named if layer not in kept]
    if unknown:
        gone = f" Layers {stack.lineage.removed} were removed before." if stack.lineage.removed else ""
        raise LayerPruneError(
            f"layers names {unknown}, but the model has layers {kept[0]} to {kept[-1]}.{gone} Name some of "
            "these; `hf-layerprune inspect` lists them in its column original."
        )
    both = [kept[layer] for layer in stack.check_layers(args.protected or []) if kept[layer] in named]
    if both:
        raise LayerPruneError(
            f"layers names {both}, which protected keeps. Leave them out of one of the two."
        )
    return [present for present, original in enumerate(kept) if original not in named]


def _layers_for_speedup(model: PreTrainedModel, speedup: float) -> int:
    """Returns the largest number of layers of average cost with which a forward pass has this speedup.

    The speedup is measured in FLOPs.

    Raises:
        LayerPruneError: the model predicts no next tokens, or does not run without values.
    """
    check_next_token(model, "target_speedup")
    length = resolve_length(None, model.config)
    try:
        footprint = measure_footprint(build_meta_model(model), 1, length, bf16=False)
    except LayerPruneError as error:
        raise LayerPruneError(
            f"target_speedup is {speedup}, but FLOPs cannot be counted. {error} Set target_layers."
        ) from error
    whole = footprint.forward_flops(footprint.layers)
    return int((whole / speedup - footprint.head_flops) / footprint.layer_flops + 1e-9)


def _layers_within(model: PreTrainedModel, layers: list, parameters: int) -> int:
    """Returns the largest number of layers with which `model` has at most this number of parameters.

    All layers count with their average size.

    Raises:
        LayerPruneError: the parameters are sharded and cannot be counted.
    """
    if is_sharded(model):
        raise LayerPruneError(
            "target_parameters cannot count the parameters of a sharded model. Set target_layers."
        )
    in_layers = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    elsewhere = model.num_parameters() - in_layers
    return min(len(layers), (parameters - elsewhere) * len(layers) // in_layers)
