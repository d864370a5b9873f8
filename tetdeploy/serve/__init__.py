"""`tetdeploy serve`: exported models behind the Open Inference Protocol v2. The parts, from the engine outwards:

- `scheduler`: which requests run together, and when. Knows neither engines nor transports.
- `sequences`: requests that continue one another, each with its own LIF state.
- `models`: an engine with its thread, its queue and its sequences.
- `requests`: what a request of the protocol may say, and what is wrong with it.
- `bodies`: how large requests may be, each and all together.
- `metrics`: what Prometheus reads.
- `server`: HTTP and gRPC, by KServe's Python server. The only part that needs the extra `serve`.
"""
