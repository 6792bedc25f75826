"""Owns the subscription to one vLLM engine's KV-cache events: their order, what gets lost, their translation.

The scheduler queues a batch of events per step; a thread of the engine's process numbers and publishes the batches,
and keeps the last ones for whoever has missed some. The sockets are files: only this user can read them, as they
carry the tokens of prompts.
"""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import zmq
import zmq.asyncio
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import (
    MEDIUM_GPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)
from vllm.utils.network_utils import get_open_zmq_ipc_path

from engine.blocks import ChangeLog, NamedBlocks
from engine.protocol import BlockChanges
from engine.zmq_reader import ZmqReader

BUFFER_STEPS = 2_000
"""Batches the engine keeps for a replay, and queues for a subscriber that does not read."""
REPLAY_TIMEOUT_S = 5.0


def events_config() -> KVEventsConfig:
    """Turns an engine's events on, on sockets nobody else uses."""
    return KVEventsConfig(
        enable_kv_cache_events=True,
        publisher="zmq",
        endpoint=get_open_zmq_ipc_path(),
        replay_endpoint=get_open_zmq_ipc_path(),
        buffer_steps=BUFFER_STEPS,
        hwm=BUFFER_STEPS,
    )


class CacheEvents:
    """Reads one engine's events. Make it on the event loop that reads `changes()`.

    Only full blocks in the accelerator's own cache count, and in a model with several kinds of layers only those of
    the first kind: a prefix is found where all kinds have it.
    """

    def __init__(self, source: KVEventsConfig, block_size_tokens: int):
        self.num_gaps = 0
        self._source = source
        self._blocks = NamedBlocks(block_size_tokens)
        self._log = ChangeLog()
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._next_sequence = 0
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.subscribe(source.topic)
        self._socket.connect(source.endpoint)
        self._reader = ZmqReader(zmq.Socket.shadow(self._socket.underlying))

    async def changes(self) -> AsyncIterator[BlockChanges]:
        """Endless. Batches that did not arrive are asked for again; if they are lost, everything is forgotten."""
        while True:
            _, sequence, payload = await self._reader.recv_multipart()
            await self._take(int.from_bytes(sequence, "big"), payload)
            if changes := self._log.take():
                yield changes

    def close(self) -> None:
        self._reader.close()
        self._context.destroy(linger=0)

    async def _take(self, sequence: int, payload: bytes) -> None:
        missed: list[bytes] | None = []
        if sequence > self._next_sequence:
            missed = await self._replay(self._next_sequence, sequence)
        self._next_sequence = sequence + 1
        try:
            if missed is None:
                self._forget()
            for batch in [*(missed or ()), payload]:
                self._fold(self._decoder.decode(batch))
        except msgspec.DecodeError:
            self._forget()

    def _forget(self) -> None:
        self.num_gaps += 1
        self._blocks.clear()
        self._log.clear()

    def _fold(self, batch: KVEventBatch) -> None:
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self._blocks.clear()
                self._log.clear()
            elif event.group_idx or event.medium not in (None, MEDIUM_GPU):
                continue
            elif isinstance(event, BlockRemoved):
                for block_hash in self._blocks.remove(event.block_hashes):
                    self._log.remove(block_hash)
            else:
                new = self._blocks.store(event.block_hashes, event.parent_block_hash, event.token_ids, _salt(event))
                for block_hash in new:
                    self._log.store(block_hash)

    async def _replay(self, first: int, end: int) -> list[bytes] | None:
        """The batches `first` to `end` - 1, or None if the engine does not have them all any more."""
        if self._source.replay_endpoint is None:
            return None
        found: dict[int, bytes] = {}
        # A socket of its own for each replay: late answers to an earlier one cannot get into this one.
        socket = self._context.socket(zmq.DEALER)
        socket.rcvhwm = 0
        try:
            socket.connect(self._source.replay_endpoint)
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                await socket.send_multipart((b"", first.to_bytes(8, "big")))
                while True:
                    *_, sequence, payload = await socket.recv_multipart()
                    if sequence == ZmqEventPublisher.END_SEQ:
                        break
                    found[int.from_bytes(sequence, "big")] = payload
        except TimeoutError:
            return None
        finally:
            socket.close(linger=0)
        batches = [found[sequence] for sequence in range(first, end) if sequence in found]
        return batches if len(batches) == end - first else None


def _salt(event: BlockStored) -> str | None:
    """The salt of the first block of a prompt: Baton sends no images and no adapters, so it is the only extra key."""
    keys = event.extra_keys[0] if event.extra_keys else None
    return keys[0] if keys else None
