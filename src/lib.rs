//! shardcast
