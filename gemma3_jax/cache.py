"""The activations that a run captured: a read-only mapping that takes any of a site's names, and a pytree."""

from collections.abc import Iterator, Mapping

import einops
import jax

from gemma3_jax.config import Gemma3Config
from gemma3_jax.sites import resolve


@jax.tree_util.register_pytree_with_keys_class
class ActivationCache(Mapping[str, jax.Array]):
    """Captured values by site. Iterates over canonical names; index it by canonical, legacy or Hugging Face name.

    A Hugging Face path gives the value in Hugging Face's layout: `model.layers.5.self_attn.o_proj.input` is
    `blocks.5.attn.o.hook_in` with the heads flattened, [b, p, h * e].

    As a pytree its leaves are the values, so it passes through `jit`, `vmap` and `jax.tree.map`.
    """

    def __init__(self, config: Gemma3Config, values: Mapping[str, jax.Array]):
        self.config = config
        self._values = dict(values)

    def __getitem__(self, name: str) -> jax.Array:
        match = resolve(name, self.config)
        if match.name not in self._values:
            raise KeyError(f"{match.name} was not captured; this cache holds {_listed(self._values)}")
        value = self._values[match.name]
        return value if match.layout is None else einops.rearrange(value, match.layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"ActivationCache({_listed(self._values)})"

    def tree_flatten_with_keys(self):
        children = [(jax.tree_util.DictKey(name), value) for name, value in self._values.items()]
        return children, (self.config, tuple(self._values))

    @classmethod
    def tree_unflatten(cls, aux, children):
        config, names = aux
        return cls(config, dict(zip(names, children, strict=True)))


def _listed(values: Mapping[str, jax.Array], most: int = 8) -> str:
    names = list(values)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest
