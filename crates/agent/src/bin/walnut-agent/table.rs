//! The containers of this guest.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::container::Container;

/// Most containers at once.
pub(crate) const CONTAINERS_MAX: usize = 256;

/// All containers by id, those under construction included.
#[derive(Debug, Default)]
pub(crate) struct Table(Mutex<HashMap<String, Arc<Container>>>);

/// Why a container was not taken in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    Exists,
    Full,
}

impl Table {
    fn map(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a container in.
    pub(crate) fn insert(&self, container: &Arc<Container>) -> Result<(), Refused> {
        let mut map = self.map();
        let id = container.paths.id();
        if map.contains_key(id) {
            return Err(Refused::Exists);
        }
        if map.len() >= CONTAINERS_MAX {
            return Err(Refused::Full);
        }
        map.insert(id.to_owned(), Arc::clone(container));
        Ok(())
    }

    /// The container `id`.
    pub(crate) fn get(&self, id: &str) -> Option<Arc<Container>> {
        self.map().get(id).cloned()
    }

    /// Forgets the container `id`.
    pub(crate) fn remove(&self, id: &str) {
        self.map().remove(id);
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        self.map().values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use walnut_agent::names::ContainerPaths;

    fn container(id: &str) -> Arc<Container> {
        Arc::new(Container::new(ContainerPaths::new(id).unwrap(), Vec::new()))
    }

    #[test]
    fn ids_are_unique_and_the_table_is_bounded() {
        let table = Table::default();
        for n in 0..CONTAINERS_MAX {
            table.insert(&container(&n.to_string())).unwrap();
        }
        assert_eq!(table.insert(&container("7")), Err(Refused::Exists));
        assert_eq!(table.insert(&container("x")), Err(Refused::Full));
        table.remove("7");
        assert!(table.insert(&container("7")).is_ok());
    }
}
