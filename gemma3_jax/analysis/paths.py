"""Path patching: the effect of one component on another along the direct path.

Axes: s senders, b batch, p position, h query heads, g key/value heads, d hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, Unpack

import flax.struct
import jax
import numpy as np

from gemma3_jax.analysis import nodes
from gemma3_jax.analysis.nodes import Kind, Node
from gemma3_jax.analysis.patching import clean_cache
from gemma3_jax.analysis.sweeps import SweepOptions, measured_sweep
from gemma3_jax.cache.activations import ActivationCache
from gemma3_jax.grids import named_grid
from gemma3_jax.hooked.hooked import HookedGemma3
from gemma3_jax.hooked.tokenizer import Input
from gemma3_jax.hooks.edits import Add, Only, only
from gemma3_jax.run.gradients import Metric, scalar
from gemma3_jax.sites.names import block
from gemma3_jax.types import IntegersLike

# A `Node`, or a plain tuple with the same fields.
AnyNode: TypeAlias = Node | tuple[Kind] | tuple[Kind, int] | tuple[Kind, int, int]


def path_patching(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    receivers: Sequence[AnyNode],
    senders: Sequence[AnyNode] | None = None,
    *,
    attention_mask: IntegersLike | None = None,
    **options: Unpack[SweepOptions],
) -> np.ndarray:
    """The metric of the corrupted run with only the direct path from a sender to the receivers patched.

    For each sender, the receivers read a residual stream in which the sender's output is that of the clean run. Every
    component between the sender and the receivers keeps its corrupted output, and every component after the receivers
    is computed as usual. A head's output is changed before the layer's post-norm, and the real post-norm is applied to
    the changed sum. The norms before the receivers are also computed on the changed stream. A sender that comes after
    all receivers has no effect.

    Source: Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

    Peak memory: that of `sweep`, and 4 s b p d bytes for the outputs of the senders.

    Args:
        model: the model.
        corrupted: the input to run: text, texts or ids [b, p].
        clean: the other run's `ActivationCache`, with `nodes.sites_written(config)`, or its input.
        metric: `metric(logits) -> []`, see `sweep`.
        receivers: (kind, layer, head) of each receiver; all of them are patched together: ("q" | "k" | "v", layer,
            head), ("mlp", layer) or ("logits",); see `nodes.receivers`.
        senders: ("embed",), ("head", layer, head) or ("mlp", layer); all of `nodes.senders(config)` by default.
        attention_mask: [b, p], 1 at real tokens, of both inputs.
        **options: options of `sweep`.

    Returns:
        [s] float32, in the order of `senders`.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> values = path_patching(model, "ba ke ti ba ke", "ba ke lo ba ke", lambda logits: logits[0, -1].max(),
    ...                        receivers=[("k", 1, 0)], senders=[("embed",), ("head", 0, 1), ("mlp", 0)])
    >>> values.shape
    (3,)
    """
    config = model.config
    every = nodes.senders(config)
    chosen = [nodes.check(Node(*each), every, "sender") for each in (every if senders is None else senders)]
    reading = tuple(nodes.check(Node(*each), nodes.receivers(config), "receiver") for each in receivers)
    if not chosen or not reading:
        raise ValueError("path_patching needs at least one sender and one receiver")
    inputs = model.inputs(corrupted, attention_mask)
    needed = nodes.sites_written(config)
    before = model.run_with_cache(inputs, needed, return_type=None)[1]
    after = clean_cache(model, clean, needed, inputs, attention_mask)
    rows = np.asarray([every.index(sender) for sender in chosen])
    items = {
        "written": nodes.written_differences(config, model.params, after, before)[rows],
        "reads": np.asarray([[nodes.writes_before(s, r) for r in reading] for s in chosen], np.float32),
    }
    values = measured_sweep(model, inputs, _Patch(reading), items, metric, check=scalar, **options)[0]
    names = [" ".join(str(part) for part in sender if part is not None) for sender in chosen]
    return named_grid(values, ("sender",), "path patching", {"sender": names}, config=config)


@flax.struct.dataclass
class _Patch:
    """The edits for one sender: its change of the residual stream is added to the input of each receiver."""

    receivers: tuple[Node, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, item: dict[str, jax.Array]) -> dict[str, list[Add | Only]]:
        edits: dict[str, list[Add | Only]] = {}
        for i, node in enumerate(self.receivers):
            name, written = reads_at(node), item["written"]
            if node.head is None:
                edit: Add | Only = Add(written, item["reads"][i])
            else:
                # [b, p, 1, d], to the copy of one head
                edit = only(Add(written[:, :, None], item["reads"][i]), heads=node.head)
            edits.setdefault(name, []).append(edit)
        return edits


def reads_at(receiver: Node) -> str:
    """The site of a receiver's own input: [b, p, d], or [b, p, heads, d] for q, k and v."""
    i = receiver.layer
    if i is None:
        return "ln_final.hook_in"
    return block(i, "ln2.hook_in") if receiver.kind == "mlp" else block(i, f"hook_{receiver.kind}_input")
