"""The machine: all I/O of a Countersign member (libp2p, RocksDB, HTTP, files, clocks, keys, processes).

Trio throughout. The rules live in ``consensus``; nothing here decides what is admissible.
"""
