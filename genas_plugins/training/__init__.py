"""The parts of supernet training that do not depend on a host's trainer."""
