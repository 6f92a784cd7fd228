//! Namespace lab, sabotage and traffic probes for tests, benchmarks and the quickstart.
