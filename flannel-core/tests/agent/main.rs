//! The whole agent against the fake kernel and the store in memory, on a clock that stands still: reactions one by one
//! (scripted), and many nodes at random (simulated).
#![cfg(feature = "testing")]

#[cfg(test)]
mod altered;
#[cfg(test)]
mod asleep;
#[cfg(test)]
mod away;
#[cfg(test)]
mod crowds;
#[cfg(test)]
mod direct;
#[cfg(test)]
mod ending;
#[cfg(test)]
mod fights;
#[cfg(test)]
mod former;
#[cfg(test)]
mod gateway;
#[cfg(test)]
mod guards;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod log;
#[cfg(test)]
mod node;
#[cfg(test)]
mod preview;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod sharing;
#[cfg(test)]
mod simulated;
#[cfg(test)]
mod slow;
#[cfg(test)]
mod start;
#[cfg(test)]
mod storms;
#[cfg(test)]
mod telling;
#[cfg(test)]
mod tenure;
#[cfg(test)]
mod tunnel;
#[cfg(test)]
mod uplink;
#[cfg(test)]
mod watch;
