"""The contract of the token statistics in plain torch: CPUs, other back ends, and the oracle's twin."""
