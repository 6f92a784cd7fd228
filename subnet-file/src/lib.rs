//! Embedded lease store of flannelkit: a directory of JSON records.
