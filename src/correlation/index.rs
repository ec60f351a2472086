//! A map that is looked up and never walked. PURE.
//!
//! A look-up costs the same beside ten entries and ten thousand. What is walked has an ordered map or set of its own: the
//! order of hashes must decide nothing, so there is no way here to iterate.

use std::borrow::Borrow;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::hash::{BuildHasherDefault, DefaultHasher, Hash};

/// The hasher has fixed keys: two runs are alike to the last allocation.
#[derive(Clone)]
pub(super) struct Index<K, V>(HashMap<K, V, BuildHasherDefault<DefaultHasher>>);

/// Sorted: equal maps print alike, whatever was in them before.
impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Index<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut entries: Vec<String> = self.0.iter().map(|entry| format!("{entry:?}")).collect();
        entries.sort();
        f.debug_set().entries(entries).finish()
    }
}

impl<K, V> Default for Index<K, V> {
    fn default() -> Self {
        Index(HashMap::default())
    }
}

impl<K: Eq + Hash, V> Index<K, V> {
    pub fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.0.get(key)
    }

    pub fn get_mut<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        self.0.get_mut(key)
    }

    pub fn contains_key<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.0.contains_key(key)
    }

    /// Returns what was there before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.0.insert(key, value)
    }

    pub fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.0.remove(key)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl<K: Eq + Hash, V: Default> Index<K, V> {
    /// The value of this key; the default is put there when there was none.
    pub fn or_default(&mut self, key: K) -> &mut V {
        self.0.entry(key).or_default()
    }
}

/// An [`Index`] that can be walked, in the order of its keys. To insert and to remove cost a search of that order.
#[derive(Debug, Clone)]
pub(super) struct Ordered<K, V> {
    index: Index<K, V>,
    keys: BTreeSet<K>,
}

impl<K, V> Default for Ordered<K, V> {
    fn default() -> Self {
        Ordered {
            index: Index::default(),
            keys: BTreeSet::new(),
        }
    }
}

impl<K: Eq + Hash + Ord + Clone, V> Ordered<K, V> {
    pub fn get(&self, key: &K) -> Option<&V> {
        self.index.get(key)
    }

    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.index.get_mut(key)
    }

    pub fn insert(&mut self, key: K, value: V) {
        self.keys.insert(key.clone());
        self.index.insert(key, value);
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        self.keys.remove(key);
        self.index.remove(key)
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn keys(&self) -> impl ExactSizeIterator<Item = &K> {
        self.keys.iter()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.keys
            .iter()
            .filter_map(|key| Some((key, self.index.get(key)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_walked_comes_in_the_order_of_its_keys_and_nothing_removed_comes() {
        let mut ordered = Ordered::default();
        for key in [7, 3, 1000, 5, 1, 64] {
            ordered.insert(key, key * 2);
        }
        ordered.insert(5, 50);
        assert_eq!(ordered.remove(&64), Some(128));
        assert_eq!(ordered.remove(&64), None);
        let walked: Vec<(i32, i32)> = ordered.iter().map(|(k, v)| (*k, *v)).collect();
        assert_eq!(walked, [(1, 2), (3, 6), (5, 50), (7, 14), (1000, 2000)]);
        assert_eq!(ordered.len(), ordered.keys().count());
    }
}
