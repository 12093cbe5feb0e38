"""The number of layers to keep, from a share of the layers or a number of parameters."""

from dataclasses import replace

from transformers import PreTrainedModel

from ..errors import LayerPruneError
from ..surgery.decoder import is_sharded
from ..surgery.layer_stack import LayerStack
from ..surgery.peft import base_of
from .arguments import Arguments, parameter_count


def resolve_target(args: Arguments, model: PreTrainedModel) -> Arguments:
    """Returns the same settings with `target_layers` in place of `target_ratio` or `target_parameters`.

    Args:
        args ([`RemovalArguments`]): the settings.
        model (`PreTrainedModel`): the model to prune. It may be on the meta device.

    Raises:
        LayerPruneError: no number of layers fits the target.
    """
    if args.target_layers is not None:
        return args
    model = base_of(model)
    layers = LayerStack(model).layers
    if args.target_ratio is not None:
        target = int(args.target_ratio * len(layers) + 1e-9)  # 0.7 * 10 is less than 7
        given = f"target_ratio is {args.target_ratio}"
    else:
        target = _layers_within(model, list(layers), parameter_count(args.target_parameters))
        given = f"target_parameters is {args.target_parameters}"
    if not 1 <= target < len(layers):
        raise LayerPruneError(
            f"{given}, which keeps {max(0, target)} of the {len(layers)} layers. Choose a value that keeps "
            f"between 1 and {len(layers) - 1} layers, or set target_layers."
        )
    return replace(args, target_layers=target, target_ratio=None, target_parameters=None)


def _layers_within(model: PreTrainedModel, layers: list, parameters: int) -> int:
    """Returns the most layers of average size with which `model` has no more than so many parameters.

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
