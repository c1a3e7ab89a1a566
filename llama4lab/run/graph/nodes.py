"""The nodes of the computational graph of the text layers, and the edges that there are between them.

*Senders* write into the residual stream: the embedded tokens (images merged in), each attention head, each routed
expert, each shared expert, each dense MLP. *Receivers* read it, each through the norm of its block: the query of each
head, the key and the value of each KV head, the router, the input of each routed expert, of each shared expert, of each
dense MLP, and the logits. An edge goes from every sender to every receiver that comes later; it carries what the sender
wrote.

Keys and values belong to KV heads. Several query heads read one, so what reaches a key or a value reaches all of them;
a path "through the key of one query head" does not exist in grouped-query attention.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import Llama4TextConfig

from llama4lab.model.layer_kinds import is_moe

Role = Literal["sender", "receiver"]
Nodes = str | Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class Node:
    """A sender or a receiver.

    Attributes:
        name: The hook point or module that it is part of, then its number, if there are several:
            "layers.3.self_attn.head_out.1", "layers.3.feed_forward.experts.5".
        part: Which part of a layer: "embed", "head", "expert", "shared_expert", "mlp"; of receivers "q", "k", "v",
            "router", "expert", "shared_expert", "mlp", "logits".
        layer: The layer; None for the embedding and the logits.
        index: The number of the head, KV head or expert; 0 where there is one.
        stage: When it acts: -1 for the embedding, 2i for the attention of layer i, 2i + 1 for its feed-forward, and
            2 * num_layers for the logits. What is written in a stage is read in all later ones.
        heads: The query heads that it concerns: those that share a KV head, for its key or value.
    """

    name: str
    part: str
    layer: int | None
    index: int
    stage: int
    heads: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Graph:
    """All nodes, in the order of the forward pass.

    Attributes:
        senders: The nodes that write.
        receivers: The nodes that read.
    """

    senders: list[Node]
    receivers: list[Node]

    @cached_property
    def edges(self) -> Bool[Tensor, "sender receiver"]:
        """Which pairs are edges."""
        written, read = (torch.tensor([node.stage for node in nodes]) for nodes in (self.senders, self.receivers))
        return written[:, None] < read

    @cached_property
    def feeds(self) -> Bool[Tensor, "receiver sender"]:
        """Which senders compute what they write from which receivers, inside one block."""
        fed = torch.zeros(len(self.receivers), len(self.senders), dtype=torch.bool)
        for i, receiver in enumerate(self.receivers):
            for j, sender in enumerate(self.senders):
                if sender.stage != receiver.stage:
                    continue
                if receiver.heads:
                    fed[i, j] = sender.index in receiver.heads
                elif receiver.part == "router":
                    fed[i, j] = sender.part == "expert"
                else:
                    fed[i, j] = (sender.part, sender.index) == (receiver.part, receiver.index)
        return fed

    def block(self, role: Role, stage: int, part: str | None = None) -> slice:
        """Where the nodes of a stage stand, or those of one part of it."""
        nodes = self.senders if role == "sender" else self.receivers
        found = [i for i, node in enumerate(nodes) if node.stage == stage and part in (None, node.part)]
        return slice(found[0], found[-1] + 1) if found else slice(0, 0)

    def sets(self, role: Role, nodes: Nodes) -> dict[str, list[int]]:
        """The sets of nodes that a caller means, by what to call them.

        A name or glob (part by part, `*` for one part, `**` for several) means each node that matches by itself. A
        mapping of labels to names or globs means one set for each label. `layers.3.resid_post` and the like mean the
        residual stream there: as a sender all that has been written so far, as a receiver all that read it from there
            on.

        Raises:
            ValueError: if a name or glob matches nothing.
        """
        if isinstance(nodes, Mapping):
            return {
                label: sorted({i for found in self.sets(role, own).values() for i in found})
                for label, own in nodes.items()
            }
        known = {node.name: [i] for i, node in enumerate(self.senders if role == "sender" else self.receivers)}
        streams = self._streams(role)
        sets: dict[str, list[int]] = {}
        for pattern in [nodes] if isinstance(nodes, str) else nodes:
            among = streams if ".resid_" in pattern else known
            found = {name: own for name, own in among.items() if _matches(name, pattern)}
            if not found:
                near = get_close_matches(pattern, [*known, *streams], n=4, cutoff=0.4)
                raise ValueError(
                    f"{pattern!r} matches none of the {len(known)} {role}s of this model.\n"
                    f"Near names: {', '.join(near) or 'none'}. All of them: graph_of(model).{role}s."
                )
            sets |= found
        return sets

    def _streams(self, role: Role) -> dict[str, list[int]]:
        """The residual stream at its hook points."""
        sets: dict[str, list[int]] = {}
        for layer in range(self.receivers[-1].stage // 2):
            for place, stage in (("pre", 2 * layer), ("mid", 2 * layer + 1), ("post", 2 * layer + 2)):
                if role == "sender":
                    own = [i for i, node in enumerate(self.senders) if node.stage < stage]
                else:
                    own = [i for i, node in enumerate(self.receivers) if node.stage >= stage]
                sets[f"layers.{layer}.resid_{place}"] = own
        return sets


def graph_of(config: Llama4TextConfig) -> Graph:
    """The graph of a text model.

    Args:
        config: Its settings.
    """
    senders, receivers = [Node("embed_merged", "embed", None, 0, -1)], []
    for layer in range(config.num_hidden_layers):
        kind = _expert_nodes if is_moe(config, layer) else _dense_nodes
        for written, read in (_attention_nodes(config, layer), kind(config, layer)):
            senders += written
            receivers += read
    receivers.append(Node("logits", "logits", None, 0, 2 * config.num_hidden_layers))
    return Graph(senders, receivers)


def _attention_nodes(config: Llama4TextConfig, layer: int) -> tuple[list[Node], list[Node]]:
    path, stage = f"layers.{layer}.self_attn", 2 * layer
    heads, kv_heads = range(config.num_attention_heads), range(config.num_key_value_heads)
    group = len(heads) // len(kv_heads)
    senders = [Node(f"{path}.head_out.{head}", "head", layer, head, stage, (head,)) for head in heads]
    receivers = [Node(f"{path}.q.{head}", "q", layer, head, stage, (head,)) for head in heads]
    for part in ("k", "v"):
        for kv in kv_heads:
            shared = tuple(range(kv * group, (kv + 1) * group))
            receivers.append(Node(f"{path}.{part}.{kv}", part, layer, kv, stage, shared))
    return senders, receivers


def _expert_nodes(config: Llama4TextConfig, layer: int) -> tuple[list[Node], list[Node]]:
    path, stage = f"layers.{layer}.feed_forward", 2 * layer + 1
    experts = range(config.num_local_experts)
    senders = [Node(f"{path}.experts.out.{expert}", "expert", layer, expert, stage) for expert in experts]
    senders.append(Node(f"{path}.shared_expert.out", "shared_expert", layer, 0, stage))
    receivers = [Node(f"{path}.router", "router", layer, 0, stage)]
    receivers += [Node(f"{path}.experts.{expert}", "expert", layer, expert, stage) for expert in experts]
    receivers.append(Node(f"{path}.shared_expert", "shared_expert", layer, 0, stage))
    return senders, receivers


def _dense_nodes(_: Llama4TextConfig, layer: int) -> tuple[list[Node], list[Node]]:
    path, stage = f"layers.{layer}.feed_forward", 2 * layer + 1
    return [Node(f"{path}.out", "mlp", layer, 0, stage)], [Node(path, "mlp", layer, 0, stage)]


def _matches(name: str, pattern: str) -> bool:
    parts = [re.escape(part).replace(r"\*\*", ".*").replace(r"\*", "[^.]*") for part in pattern.split(".")]
    return re.fullmatch(r"\.".join(parts), name) is not None


def node_counts(nodes: Iterable[Node]) -> dict[str, int]:
    """How many nodes there are of each part."""
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.part] = counts.get(node.part, 0) + 1
    return counts
