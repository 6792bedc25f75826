"""Owns the faults of a simulated world: one after the other, each when the world is whole again, drawn from a seed.

Single faults are what costs no client anything. A long request may meet several of them one after the other, and the
life cycle gives it up at the loss of its fifth placement: while one has had SPARED_AFTER, there is no further fault.
"""

import asyncio
import random
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from bench.network import Node
from engine.protocol import Phase
from gateway.lifecycle import MAX_PLACEMENTS, SequenceState, Stage

if TYPE_CHECKING:
    from bench.world import Gateway, World

LOOK_S = 0.02
LOOK_FOR_S = 5.0
"""For so long a state is waited for that a fault is to hit; then it is left out."""
SPARED_AFTER = MAX_PLACEMENTS - 1
"""One fault may cost two placements: a prefill replica that hangs, and then another one that the rest overloads."""
GAP_S = (0.0, 1.0)
REMOVAL_S = (0.1, 2.0)
"""Until the pool is told that a replica is dead."""
COLD_START_S = (1.0, 3.0)
WORKER_HANGS_S = (1.0, 20.0)
ENGINE_HANGS_S = (5.0, 30.0)
GATEWAY_HANGS_S = (1.0, 25.0)
ROOM_REPORTS = 8
"""So many reports, which a gateway that hangs does not read, fill a stream that is to be reset."""
POOL_GONE_S = (2.0, 15.0)
POOL_HANGS_S = (7.0, 20.0)
"""Longer than gateways wait for a report: shorter ones are not a loss."""
LINK_BROKEN_S = (0.0, 3.0)
NOTICED_S = (0.0, 1.5)
SETTLES_S = 2.0
"""By then everybody has noticed a fault. Before, all may look whole, and the next one would come on top of it."""

GONE_ON_S = 1.0
"""Within so long a gateway that goes on has read what it was sent."""
DRAIN_LIMIT_S = 120.0
DRAINED_LIMIT_S = 32.0
"""How long blocks may stay on a replica that no gateway holds any more: a lease, and a little."""


class Kind(StrEnum):
    """What fails, and in which state of a request. Its replica is drawn among those that are in that state."""

    PREFILL_DIES_IDLE = "prefill dies idle"
    PREFILL_DIES_READING = "prefill dies while it reads"
    PREFILL_DIES_HOLDING = "prefill dies before the pull has ended"
    DECODE_DIES_NEW = "decode dies when it has just joined"
    DECODE_DIES_WAITING = "decode dies while prefill reads"
    DECODE_DIES_PULLING = "decode dies before the pull has ended"
    DECODE_DIES_WRITING = "decode dies in mid-stream"
    PREFILL_WORKER_HANGS = "prefill worker hangs"
    DECODE_WORKER_HANGS = "decode worker hangs"
    PREFILL_ENGINE_HANGS = "prefill engine hangs"
    DECODE_ENGINE_HANGS = "decode engine hangs"
    PULL_FAILS = "pull fails"
    ASKED_DIES = "decode dies while it is asked"
    ASKED_DIES_HOLDING = "decode dies before prefill has fetched what it was asked for"
    PREFILL_DIES_FETCHING = "prefill dies while it fetches or reads"
    ASK_PULL_FAILS = "pull from decode fails"
    LINK_BREAKS = "link breaks"
    EVENTS_LOST = "cache events are lost"
    GATEWAY_DIES = "gateway dies"
    PREFILL_LEAVES = "prefill leaves its pool"
    DECODE_LEAVES = "decode leaves its pool"
    GATEWAY_HANGS = "gateway hangs"
    GATEWAY_HANGS_UNREAD = "gateway hangs until its streams are reset"
    PREFILL_POOL_DIES = "all prefill replicas die"
    DECODE_POOL_DIES = "all decode replicas die"
    PREFILL_POOL_HANGS = "all prefill workers hang"
    DECODE_POOL_HANGS = "all decode workers hang"


WEIGHTS = {
    Kind.PREFILL_DIES_IDLE: 1,
    Kind.PREFILL_DIES_READING: 2,
    Kind.PREFILL_DIES_HOLDING: 2,
    Kind.DECODE_DIES_NEW: 1,
    Kind.DECODE_DIES_WAITING: 3,
    Kind.DECODE_DIES_PULLING: 3,
    Kind.DECODE_DIES_WRITING: 8,
    Kind.PREFILL_WORKER_HANGS: 1,
    Kind.DECODE_WORKER_HANGS: 3,
    Kind.PREFILL_ENGINE_HANGS: 1,
    Kind.DECODE_ENGINE_HANGS: 2,
    Kind.PULL_FAILS: 2,
    Kind.ASKED_DIES: 3,
    Kind.ASKED_DIES_HOLDING: 3,
    Kind.PREFILL_DIES_FETCHING: 2,
    Kind.ASK_PULL_FAILS: 2,
    Kind.LINK_BREAKS: 3,
    Kind.EVENTS_LOST: 1,
    Kind.GATEWAY_DIES: 1,
    Kind.PREFILL_LEAVES: 1,
    Kind.DECODE_LEAVES: 3,
    Kind.GATEWAY_HANGS: 2,
    Kind.GATEWAY_HANGS_UNREAD: 1,
    Kind.PREFILL_POOL_DIES: 1,
    Kind.DECODE_POOL_DIES: 1,
    Kind.PREFILL_POOL_HANGS: 1,
    Kind.DECODE_POOL_HANGS: 1,
}

OF_ASKS = frozenset({Kind.ASKED_DIES, Kind.ASKED_DIES_HOLDING, Kind.PREFILL_DIES_FETCHING, Kind.ASK_PULL_FAILS})
"""Only in worlds where decode is asked."""

StateOf = Callable[[SequenceState], str | None]
"""The replica that a sequence makes a target of, if it is in the state in question."""


def _reading(state: SequenceState) -> str | None:
    return state.prefill if state.stage is Stage.PREFILLING else None


def _holding(state: SequenceState) -> str | None:
    return state.handoff.source_replica if state.handoff is not None else None


def _waiting(state: SequenceState) -> str | None:
    return state.decode if state.stage is Stage.PREFILLING else None


def _pulling(state: SequenceState) -> str | None:
    return state.decode if state.handoff is not None else None


def _writing(state: SequenceState) -> str | None:
    return state.decode if state.stage is Stage.DECODING and state.has_written and state.handoff is None else None


def _asked(state: SequenceState) -> str | None:
    return state.ask if state.stage is Stage.ASKING else None


def _source(state: SequenceState) -> str | None:
    return state.source.source_replica if state.source is not None else None


def _fetching_source(state: SequenceState) -> str | None:
    return state.prefill if state.source is not None else None


STATES: dict[Kind, StateOf] = {
    Kind.PREFILL_DIES_READING: _reading,
    Kind.PREFILL_DIES_HOLDING: _holding,
    Kind.DECODE_DIES_WAITING: _waiting,
    Kind.DECODE_DIES_PULLING: _pulling,
    Kind.DECODE_DIES_WRITING: _writing,
    Kind.ASKED_DIES: _asked,
    Kind.ASKED_DIES_HOLDING: _source,
    Kind.PREFILL_DIES_FETCHING: _fetching_source,
}


class Faults:
    """Breaks things in a world until it stops."""

    def __init__(self, world: "World", draw: random.Random):
        self._world = world
        self._draw = draw
        wanted = world.plan.kinds
        there = [kind for kind in Kind if world.plan.asks or kind not in OF_ASKS]
        self._kinds = [kind for kind in there if wanted is None or kind in wanted]
        self._deck = list(self._kinds)
        self._draw.shuffle(self._deck)

    async def run(self) -> None:
        world = self._world
        while self._kinds and not world.is_stopping:
            await asyncio.sleep(self._draw.uniform(*GAP_S))
            if any(sequence.state.num_placements >= SPARED_AFTER for _, sequence in world.sequences()):
                continue
            kind = self._next()
            await self._break(kind)
            await asyncio.sleep(SETTLES_S)
            try:
                await world.until_whole()
            except TimeoutError:
                world.problem("left_behind", f"the pools did not become whole again after: {kind}")
                return
            world.outages_end()

    def _next(self) -> Kind:
        """Kinds are dealt like cards, first one of each, so that the rare ones come too."""
        if not self._deck:
            self._deck = [kind for kind in self._kinds for _ in range(WEIGHTS[kind])]
            self._draw.shuffle(self._deck)
        return self._deck.pop()

    async def _break(self, kind: Kind) -> None:
        world, draw = self._world, self._draw
        match kind:
            case Kind.DECODE_DIES_NEW:
                node = world.new_node(Phase.DECODE)
                await asyncio.sleep(draw.uniform(0.0, 4.0))
                await self._dies(kind, node, is_replaced=False)
            case Kind.PREFILL_DIES_IDLE:
                busy = {state.prefill for _, sequence in world.sequences() if (state := sequence.state).prefill}
                nodes = [node for node in self._pool(Phase.PREFILL) if node.replica_id not in busy]
                await self._dies(kind, draw.choice(nodes or self._pool(Phase.PREFILL)))
            case Kind.PREFILL_WORKER_HANGS | Kind.DECODE_WORKER_HANGS:
                node = draw.choice(self._pool(Phase.PREFILL if "prefill" in kind else Phase.DECODE))
                world.hits(kind, [node])
                node.awake.clear()
                await asyncio.sleep(draw.uniform(*WORKER_HANGS_S))
                node.awake.set()
            case Kind.PREFILL_ENGINE_HANGS | Kind.DECODE_ENGINE_HANGS:
                node = draw.choice(self._pool(Phase.PREFILL if "prefill" in kind else Phase.DECODE))
                world.hits(kind, [node])
                node.engine.hang()
                await asyncio.sleep(draw.uniform(*ENGINE_HANGS_S))
                node.engine.go_on()
            case Kind.PULL_FAILS:
                await self._pull_fails(kind, _holding)
            case Kind.ASK_PULL_FAILS:
                await self._pull_fails(kind, _source)
            case Kind.LINK_BREAKS:
                gateway, node = draw.choice(world.gateways), draw.choice(world.nodes)
                world.hits(kind, [node], gateway)
                gateway.transport.break_link(node.replica_id, draw.uniform(*LINK_BROKEN_S), draw.uniform(*NOTICED_S))
            case Kind.EVENTS_LOST:
                node = draw.choice(world.nodes)
                world.begins(kind, [node.replica_id])
                node.engine.lose_block_changes()
            case Kind.GATEWAY_DIES:
                gateway = draw.choice(world.gateways)
                world.begins(kind, [gateway.gateway_id])
                await world.gateway_dies(gateway, draw.uniform(*NOTICED_S))
                await asyncio.sleep(draw.uniform(*COLD_START_S))
                await world.new_gateway()
            case Kind.PREFILL_LEAVES | Kind.DECODE_LEAVES:
                await self._leaves(kind, draw.choice(self._pool(Phase.PREFILL if "prefill" in kind else Phase.DECODE)))
            case Kind.GATEWAY_HANGS | Kind.GATEWAY_HANGS_UNREAD:
                await self._gateway_hangs(kind, draw.choice(world.gateways))
            case Kind.PREFILL_POOL_DIES | Kind.DECODE_POOL_DIES:
                await self._pool_dies(kind, Phase.PREFILL if "prefill" in kind else Phase.DECODE)
            case Kind.PREFILL_POOL_HANGS | Kind.DECODE_POOL_HANGS:
                await self._pool_hangs(kind, Phase.PREFILL if "prefill" in kind else Phase.DECODE)
            case _:
                if node := await self._found(STATES[kind]):
                    await self._dies(kind, node)

    async def _dies(self, kind: Kind, node: Node, *, is_replaced: bool = True) -> None:
        world, draw = self._world, self._draw
        world.hits(kind, [node])
        node.engine.die()
        await asyncio.sleep(draw.uniform(*REMOVAL_S))
        world.network.leave_pool(node)
        if is_replaced:
            await asyncio.sleep(draw.uniform(*COLD_START_S))
            world.new_node(node.phase)

    async def _gateway_hangs(self, kind: Kind, gateway: "Gateway") -> None:
        """Nothing of it runs for a while. Then it has lost nobody but those whose streams were reset because it did not
        read them, and these may be all."""
        world, transport = self._world, gateway.transport
        num_unread = transport.num_unread
        world.begins(kind, [gateway.gateway_id], list(gateway.asks.values()))
        if kind is Kind.GATEWAY_HANGS_UNREAD:
            transport.room_reports = ROOM_REPORTS
        gateway.process.hang()
        await asyncio.sleep(self._draw.uniform(*GATEWAY_HANGS_S))
        transport.room_reports = None
        if has_lost := transport.num_unread > num_unread:
            world.outage_begins([gateway], *Phase)
        gateway.process.go_on()
        await asyncio.sleep(GONE_ON_S)
        if not has_lost and not gateway.is_whole(world.network.members):
            world.problem("wrong", f"{gateway.gateway_id} has hung and lost replicas that were well")

    async def _pool_dies(self, kind: Kind, phase: Phase) -> None:
        """All at once, and after a while there are as many new ones."""
        world, draw, nodes = self._world, self._draw, self._pool(phase)
        world.outage_begins(world.gateways, phase)
        world.hits(kind, nodes)
        for node in nodes:
            node.engine.die()
        await asyncio.sleep(draw.uniform(*REMOVAL_S))
        for node in nodes:
            world.network.leave_pool(node)
        await asyncio.sleep(draw.uniform(*POOL_GONE_S))
        for _ in nodes:
            world.new_node(phase)

    async def _pool_hangs(self, kind: Kind, phase: Phase) -> None:
        world, nodes = self._world, self._pool(phase)
        world.outage_begins(world.gateways, phase)
        world.hits(kind, nodes)
        for node in nodes:
            node.awake.clear()
        await asyncio.sleep(self._draw.uniform(*POOL_HANGS_S))
        for node in nodes:
            node.awake.set()

    async def _leaves(self, kind: Kind, node: Node) -> None:
        """A replica is replaced by a new one and ends when all gateways have let go of it."""
        world = self._world
        world.hits(kind, [node])
        world.new_node(node.phase)
        if self._draw.random() < 0.5:
            await asyncio.sleep(self._draw.uniform(0.0, 3.0))
        world.network.leave_pool(node)
        try:
            async with asyncio.timeout(DRAIN_LIMIT_S):
                while node.num_links:  # noqa: ASYNC110 - virtual time
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            world.problem("left_behind", f"{node.replica_id} could not drain")
        # A hand-off that was told into a link that had just broken is still there, until its lease ends.
        for _ in range(int(DRAINED_LIMIT_S)):
            await asyncio.sleep(1.0)
            if not node.engine.load.num_kv_blocks_used:
                break
        else:
            world.problem("left_behind", f"{node.replica_id} has drained and still has {node.engine.load}")
        await world.ends(node)

    async def _pull_fails(self, kind: Kind, holding: StateOf) -> None:
        """An engine forgets a hand-off that is being fetched."""
        world = self._world
        if (node := await self._found(holding)) is None:
            return
        for ask, sequence in world.sequences():
            handoff = sequence.state.handoff if holding is _holding else sequence.state.source
            if handoff and handoff.source_replica == node.replica_id and node.engine.keeps(handoff):
                world.begins(kind, [node.replica_id, ask.request_id], [ask])
                node.engine.unpin(handoff)
                return

    async def _found(self, state_of: StateOf) -> Node | None:
        """A member that a request in some state makes a target of; None if there is none for some time."""
        world = self._world
        members = {node.replica_id: node for node in world.nodes}
        for _ in range(int(LOOK_FOR_S / LOOK_S)):
            found = dict.fromkeys(state_of(sequence.state) for _, sequence in world.sequences())
            if nodes := [members[replica_id] for replica_id in found if replica_id in members]:
                return self._draw.choice(nodes)
            await asyncio.sleep(LOOK_S)
        return None

    def _pool(self, phase: Phase) -> list[Node]:
        return [node for node in self._world.nodes if node.phase is phase]
