"""`tetdeploy serve`: exported models behind the Open Inference Protocol v2. The parts, from the engine outwards:

- `scheduler`: which requests run together, and when. Knows neither engines nor transports.
- `sequences`: requests that continue one another, each with its own LIF state.
- `models`: an engine with its thread, its queue and its sequences.
- `requests`: what a request of the protocol may say, and what is wrong with it.
- `protocol`: models in the protocol's terms.
- `bodies`: how large requests may be, each and all together.
- `metrics`: what Prometheus reads.
- `errors`: what an error is to a client.
- `rest`, `rest_messages`: the endpoints over HTTP; requests and answers there.
- `rpc`, `rpc_messages`: the same over gRPC.
- `server`: all of it, from start to a graceful stop.

`bodies` and those after it need the extra `serve`.
"""

import os

# Before gRPC is imported: its C core writes a line for each call with headers that it cannot read, which any client can
# have it do until a pipe that nobody reads is full, and the server waits for ever.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# A variable for servers of several processes, read as prometheus_client is imported: counters would be files where it
# says, which a later process of the same number goes on with, and a folder that is not there would end this one.
for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
    os.environ.pop(name, None)
