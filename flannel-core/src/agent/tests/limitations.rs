//! What makes a data plane slower than it could be.

use super::*;
use crate::kernel::Limitation;

#[test]
fn a_limitation_is_shown_for_as_long_as_it_lasts_and_told_when_it_comes_and_goes() {
    let mut machine = machine();
    machine.handle(at(0), Input::Store(Ok(own_record())));
    let limited = |cause: &str| Limitation::new("receive offload", cause);
    let name = device().name;
    let mut audit = |secs: u64, limitations: Vec<Limitation>| {
        let now = at(secs * 1000);
        let limitations = [(LinkId::Own(0), limitations)].into();
        let seen = State { links: [(LinkId::Own(0), device())].into(), limitations, ..State::default() };
        machine.handle(now, Input::Hint(Hint::Changed));
        machine.handle(now, Input::Timer);
        serve(&mut machine, now, &seen);
        let events = std::mem::take(&mut machine.events);
        let is_told = |event: &Event| matches!(event, Event::Limited(..) | Event::LimitationGone(..));
        (machine.status.limitations.to_vec(), events.into_iter().filter(is_told).collect::<Vec<_>>())
    };
    let shown = |cause| vec![(name.clone(), limited(cause))];
    assert_eq!(audit(10, vec![]), (vec![], vec![]));
    let event = Event::Limited(name.clone(), limited("none here"));
    assert_eq!(audit(20, vec![limited("none here")]), (shown("none here"), vec![event]));
    // The same limitation with another text is not reported again.
    assert_eq!(audit(30, vec![limited("still none")]), (shown("still none"), vec![]));
    let event = Event::LimitationGone(name.clone(), limited("still none"));
    assert_eq!(audit(40, vec![]), (vec![], vec![event]));
}
