"""Hundreds of clients at once, half of them up to no good: nothing is left of those, and the others are answered."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import struct
from collections import Counter
from typing import Any

import psutil

from qwen_sparse import generate_text
from qwen_sparse.serve.api import PREPARING_THREADS
from serving import CHAT, COMPLETIONS, Live, chat, eventually, live_server, passkey_model, running_engine

PROMPTS = [
    f"import {name}\n\n\ndef {name}_main(argument):\n    return " * count
    for name in ("os", "re", "json")
    for count in (1, 4, 9)
]
NEW_TOKENS = 12


def post(path: str, body: Any) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + data


class Clients:
    """All that talk to one server, with one source of randomness."""

    def __init__(self, live: Live, seed: int) -> None:
        self.live, self.random = live, random.Random(seed)
        self.answers = {
            prompt: "".join(generate_text(passkey_model(), prompt, max_new_tokens=NEW_TOKENS)) for prompt in PROMPTS
        }
        self.outcomes: Counter[str] = Counter()

    async def run(self, count: int) -> None:
        """So many at once, every second one honest."""
        await asyncio.gather(*(self.honest() if number % 2 else self.harmful() for number in range(count)))

    async def honest(self) -> None:
        """Asks, as often as it takes, and compares."""
        await asyncio.sleep(self.random.random())
        prompt, stream = self.random.choice(PROMPTS), self.random.random() < 0.5
        body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": stream}
        while True:
            reader, writer = await self.connect()
            writer.write(post(COMPLETIONS, body))
            head, _, data = (await asyncio.wait_for(reader.read(), 120)).partition(b"\r\n\r\n")
            writer.close()
            status = int(head.split()[1])
            if status != 429:
                break
            self.outcomes["asked again"] += 1
            await asyncio.sleep(0.2 + self.random.random())
        assert status == 200, data
        if stream:
            lines = [line[6:] for line in data.splitlines() if line.startswith(b"data: ")]  # others: lengths of chunks
            assert lines.pop() == b"[DONE]"
            text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
        else:
            text = json.loads(data)["choices"][0]["text"]
        assert text == self.answers[prompt]
        self.outcomes["answered"] += 1

    async def harmful(self) -> None:
        """One of several kinds."""
        await asyncio.sleep(self.random.random())
        kind = self.random.choice([self.leaves, self.leaves, self.resets, self.garbles, self.stops, self.nonsense])
        reader, writer = await self.connect()
        try:
            await kind(reader, writer)
        except ConnectionError:
            self.outcomes["cut off"] += 1
        finally:
            writer.close()
        self.outcomes[kind.__name__] += 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection."""
        return await asyncio.open_connection("127.0.0.1", self.live.port)

    def endless(self) -> bytes:
        """A request that goes on until somebody stops it."""
        prompt = self.random.choice(PROMPTS) * self.random.randint(1, 3)
        return post(CHAT, chat(prompt, stream=self.random.random() < 0.7, ignore_eos=True))

    async def leaves(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """In the middle of an answer, or of the prompt, or in the queue."""
        writer.write(self.endless())
        await writer.drain()
        await asyncio.sleep(self.random.random() * 2)

    async def resets(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As above, without a farewell."""
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.leaves(reader, writer)

    async def garbles(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """No HTTP at all."""
        writer.write(self.random.randbytes(self.random.randint(1, 5000)) + b"\r\n\r\n")
        await asyncio.wait_for(reader.read(100), 60)

    async def stops(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """In the middle of its own request."""
        request = self.endless()
        writer.write(request[: self.random.randrange(len(request))])
        await writer.drain()

    async def nonsense(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """HTTP, but no request."""
        bodies = [
            b"",
            b"{",
            b"[" * 5000,
            b"\xff" * 100,
            self.random.randbytes(1000),
            {"prompt": []},
            chat(n=5),
            chat([]),
        ]
        writer.write(post(self.random.choice([CHAT, COMPLETIONS]), self.random.choice(bodies)))
        data = await asyncio.wait_for(reader.read(), 60)
        assert data.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404"))


def test_soak() -> None:
    process = psutil.Process()
    with running_engine(kv_cache_memory=2**24, max_queue=48) as engine, live_server(engine) as live:
        clients = Clients(live, seed=1)

        def at_rest() -> bool:
            now = engine.snapshot()
            state = live.server.server_state
            return now.running == now.waiting == now.kv_cache_usage == len(state.connections) == len(state.tasks) == 0

        def wave(count: int) -> tuple[int, int, int]:
            asyncio.run(clients.run(count))
            eventually(at_rest, "every request and connection is gone")
            gc.collect()
            return process.memory_info().rss, process.num_fds(), process.num_threads()

        before = wave(60)
        clients.outcomes.clear()
        after = wave(600)
        assert clients.outcomes["answered"] == 300
        for kind in ("leaves", "resets", "garbles", "stops", "nonsense", "asked again"):
            assert clients.outcomes[kind] > 0, clients.outcomes
        assert after[0] - before[0] < 32 * 2**20  # bytes
        assert after[1] == before[1]  # file descriptors
        assert after[2] - before[2] <= PREPARING_THREADS
        assert live.send("GET", "/health")[0] == 200
        assert {record["status"] for record in live.records} <= {200, 400, 404, 429, 499}
        cancelled = [record for record in live.records if record["error"] == "client_gone"]
        assert len(cancelled) > 10  # others were refused or cut short before
