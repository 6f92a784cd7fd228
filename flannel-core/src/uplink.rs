//! Choosing the interface that carries the overlay (contract 4).
