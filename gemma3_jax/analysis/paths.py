"""Path patching: what one component tells another directly, and what comes of it.

Axes: s senders, b batch, p position, h query heads, g key/value heads, d hidden_size.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import numpy as np

from gemma3_jax.analysis import nodes
from gemma3_jax.analysis.nodes import Node
from gemma3_jax.analysis.patching import clean_cache
from gemma3_jax.analysis.sweeps import sweep
from gemma3_jax.cache import ActivationCache
from gemma3_jax.edits import Add, Only, only
from gemma3_jax.gradients import Metric
from gemma3_jax.hooked import HookedGemma3
from gemma3_jax.text import Input


def path_patching(
    model: HookedGemma3,
    corrupted: Input,
    clean: ActivationCache | Input,
    metric: Metric,
    receivers: Sequence[Node | tuple],
    senders: Sequence[Node | tuple] | None = None,
    *,
    attention_mask: Any = None,
    **options: Any,
) -> np.ndarray:
    """The metric of the corrupted run when the receivers hear a sender's clean output on the direct path only.

    For each sender in turn: its output is that of the clean run; every component between it and the receivers stays as
    it is in the corrupted run; the receivers read the residual stream so changed; everything behind the receivers runs
    on. A head's output is changed before the layer's post-norm, which is applied as it is to the changed sum, as are
    the norms that the receivers read through. A sender behind all receivers changes nothing.

    Source: Wang et al. 2022 (arXiv 2211.00593), Goldowsky-Dill et al. 2023 (arXiv 2304.05969).

    Peak memory: that of `sweep`, and 4 s b p d bytes for what the senders write.

    Args:
        model: the model.
        corrupted: the input that is run, text, texts or ids [b, p].
        clean: the other run's `ActivationCache`, with `nodes.sites_written(config)`, or its input.
        metric: `metric(logits) -> []`, see `sweep`.
        receivers: (kind, layer, head) of those that hear, together: ("q" | "k" | "v", layer, head), ("mlp", layer) or
            ("logits",); see `nodes.receivers`.
        senders: ("embed",), ("head", layer, head) or ("mlp", layer); all of `nodes.senders(config)` by default.
        attention_mask: [b, p], 1 at real tokens, of both inputs.
        **options: of `sweep`.

    Returns:
        [s] float32, in the order of `senders`.

    >>> from gemma3_jax import TINY, HookedGemma3
    >>> model = HookedGemma3.from_pretrained(TINY, dtype="float32")
    >>> heard = path_patching(model, "ba ke ti ba ke", "ba ke lo ba ke", lambda logits: logits[0, -1].max(),
    ...                       receivers=[("k", 1, 0)], senders=[("embed",), ("head", 0, 1), ("mlp", 0)])
    >>> heard.shape
    (3,)
    """
    config = model.config
    every = nodes.senders(config)
    chosen = [nodes.check(Node(*each), every, "sender") for each in (every if senders is None else senders)]
    hearing = tuple(nodes.check(Node(*each), nodes.receivers(config), "receiver") for each in receivers)
    if not chosen or not hearing:
        raise ValueError("path_patching needs one sender and one receiver at least")
    tokens, mask = model.encode(corrupted, attention_mask)
    needed = nodes.sites_written(config)
    before = model.run_with_cache(tokens, needed, return_type=None, attention_mask=mask)[1]
    after = clean_cache(model, clean, needed, tokens.shape, mask)
    rows = np.asarray([every.index(sender) for sender in chosen])
    items = {
        "written": nodes.written_differences(config, model.params, after, before)[rows],
        "heard": np.asarray([[nodes.writes_before(s, r) for r in hearing] for s in chosen], np.float32),
    }
    return sweep(model, tokens, _Hear(hearing), items, metric, attention_mask=mask, **options)


@flax.struct.dataclass
class _Hear:
    """The edits of one sender: what it writes is added to what each receiver reads."""

    receivers: tuple[Node, ...] = flax.struct.field(pytree_node=False)

    def __call__(self, item: dict[str, Any]) -> dict[str, list[Add | Only]]:
        edits: dict[str, list[Add | Only]] = {}
        for i, node in enumerate(self.receivers):
            name, written = reads_at(node), item["written"]
            if node.head is None:
                edit: Add | Only = Add(written, item["heard"][i])
            else:
                # [b, p, 1, d], to the copy of one head
                edit = only(Add(written[:, :, None], item["heard"][i]), heads=node.head)
            edits.setdefault(name, []).append(edit)
        return edits


def reads_at(receiver: Node) -> str:
    """The site with what a receiver alone reads: [b, p, d], or [b, p, heads, d] for q, k and v."""
    if receiver.kind == "logits":
        return "ln_final.hook_in"
    i = receiver.layer
    return f"blocks.{i}.ln2.hook_in" if receiver.kind == "mlp" else f"blocks.{i}.hook_{receiver.kind}_input"
