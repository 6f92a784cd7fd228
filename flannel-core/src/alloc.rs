//! Choosing a free subnet of the pool (contract 6.4).
