//! Policy rules.

use flannel_core::net::{Family, Prefix};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use super::address_family;
use crate::netlink::Raw;
use crate::{Error, Namespace};

/// A rule that looks packets from somewhere up in a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its place; unique in the lab.
    pub priority: u32,
    /// Packets from here.
    pub from: Prefix,
    /// The table.
    pub table: u8,
}

impl Namespace {
    /// `ip rule add from FROM lookup TABLE pref PRIORITY`
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_rule(&self, rule: &Rule) -> Result<(), Error> {
        let mut message = RuleMessage::default();
        message.header.family = address_family(rule.from.family());
        message.header.src_len = rule.from.len();
        message.header.table = rule.table;
        message.header.action = RuleAction::ToTable;
        message.attributes = vec![RuleAttribute::Priority(rule.priority), RuleAttribute::Source(rule.from.addr())];
        let what = format!("ip rule add from {} lookup {} pref {}", rule.from, rule.table, rule.priority);
        self.request(RouteNetlinkMessage::NewRule(message), NLM_F_CREATE | NLM_F_EXCL, &what)
    }

    /// The rules of one family: the priority of each, and what the kernel sent.
    pub(crate) fn rules_raw(&self, family: Family) -> Result<Vec<(u32, Raw)>, Error> {
        let mut message = RuleMessage::default();
        message.header.family = address_family(family);
        let mut rules = Vec::new();
        for raw in self.dump(RouteNetlinkMessage::GetRule(message), "rules")? {
            if let RouteNetlinkMessage::NewRule(message) = raw.decode()? {
                let priority = message.attributes.iter().find_map(|attribute| match attribute {
                    RuleAttribute::Priority(priority) => Some(*priority),
                    _ => None,
                });
                rules.push((priority.unwrap_or(0), raw));
            }
        }
        Ok(rules)
    }
}
