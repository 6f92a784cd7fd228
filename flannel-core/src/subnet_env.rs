//! `subnet.env`: what the CNI plug-in reads (contract 9).
