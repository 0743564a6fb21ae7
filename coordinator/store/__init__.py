"""The database behind one protocol: protocol.py says what a store promises, memory.py and sqlite.py keep it."""
