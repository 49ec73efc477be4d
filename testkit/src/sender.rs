//! How tests publish: with one delivery for everything that goes through a [`Sender`].

use std::time::Duration;

use shardcast_engine::{
    ConnectionId, Delivery, Namespace, Policy, Publication, PublishError, Receipt, TryPublishError,
};

/// A frame for which there is no room is dropped at once.
pub const DROP_AT_ONCE: Policy = Policy::DropMessage { timeout: Duration::ZERO };

/// Nobody's id, so often that a message that leaves out all of these is joined with no other one.
pub fn too_many_to_join() -> [ConnectionId; 5] {
    ["0000000000000000".parse().expect("it is an id"); 5]
}

/// A namespace, and the delivery of everything that is published through this.
#[derive(Debug, Clone)]
pub struct Sender {
    namespace: Namespace,
    delivery: Delivery,
}

impl Sender {
    /// With this policy, or with that of each connection. Panics if the policy is out of range.
    pub fn new(namespace: &Namespace, policy: Option<Policy>) -> Self {
        let delivery =
            policy.map_or_else(Delivery::default, |policy| Delivery::with_policy(policy).expect("in range"));
        Self { namespace: namespace.clone(), delivery }
    }

    /// See [`Namespace::publish`].
    pub fn publish(
        &self,
        publication: Publication,
    ) -> impl Future<Output = Result<(), PublishError>> + use<> {
        let (namespace, publication) = (self.namespace.clone(), publication.with_delivery(self.delivery));
        async move { namespace.publish(publication).await }
    }

    /// See [`Namespace::deliver`].
    pub fn deliver(
        &self,
        publication: Publication,
    ) -> impl Future<Output = Result<Receipt, PublishError>> + use<> {
        let (namespace, publication) = (self.namespace.clone(), publication.with_delivery(self.delivery));
        async move { namespace.deliver(publication).await }
    }

    /// See [`Namespace::try_publish`].
    #[allow(clippy::result_large_err, reason = "the error gives the publication back")]
    pub fn try_publish(&self, publication: Publication) -> Result<(), TryPublishError<Publication>> {
        self.namespace.try_publish(publication.with_delivery(self.delivery))
    }
}

impl From<&Namespace> for Sender {
    fn from(namespace: &Namespace) -> Self {
        Self::new(namespace, None)
    }
}

impl From<&Sender> for Sender {
    fn from(sender: &Sender) -> Self {
        sender.clone()
    }
}
