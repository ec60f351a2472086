//! Clusters of an image's file, and what is given out of them. PURE.

/// Host clusters, by their number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clusters {
    pub first: u64,
    /// Never 0.
    pub count: u64,
}

/// Clusters that were given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Given {
    pub clusters: Clusters,
    pub contents: Contents,
}

/// What a cluster that was given out reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contents {
    /// The file was made longer by it.
    Zeroes,
    /// Whatever was in it when it was given up.
    Old,
}
