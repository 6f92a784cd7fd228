//! Checks the permissions of the store's user in etcd, before a start.

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp};
use flannel_core::subnet::SubnetError;

use crate::list::after_prefix;
use crate::store::Store;

/// A record name that no node uses.
const UNUSED: &str = "0.0.0.0-0";

impl Store {
    /// Asks etcd to write a record under a condition that never holds. etcd checks the permissions of all branches of
    /// a transaction before it compares anything.
    pub(crate) async fn check_access(&self) -> Result<(), SubnetError> {
        let doing = |doing| move |fault: crate::error::Fault| fault.into_subnet_error(doing);
        let key = format!("{}{UNUSED}", self.base);
        let never = Compare::create_revision(key.as_str(), CompareOp::Less, 0);
        let records = GetOptions::new().with_range(after_prefix(&self.base)).with_count_only();
        let read = [TxnOp::get(&*self.config_key, None), TxnOp::get(&*self.base, Some(records))];
        self.txn(Txn::new().when([never.clone()]).or_else(read)).await.map_err(doing("reading the leases"))?;
        let write = [TxnOp::put(key.as_str(), "", None), TxnOp::delete(format!("{key}!"), None)];
        self.txn(Txn::new().when([never]).and_then(write)).await.map_err(doing("writing a lease"))?;
        Ok(())
    }

    /// Returns the roles of a user. Reading one's own roles needs no permission.
    pub(crate) async fn roles_of(&self, user: &str) -> Result<Vec<String>, SubnetError> {
        let ask = |mut client: etcd_client::Client| async move { client.user_get(user).await };
        let answer = self.connector.read(ask).await;
        Ok(answer.map_err(|fault| fault.into_subnet_error("reading the user's roles"))?.roles().to_vec())
    }
}
