//! The content of a guest image, independent of the format it is written in: an ordered tree of directories and
//! regular files, owned by root, without times. What the tree of a kata-rs image must hold is decided in `build`.

use std::collections::BTreeMap;

/// Where the kernel finds its first process.
pub const INIT_PATH: &str = "init";

/// A path that cannot name something in a guest image.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PathError {
    /// Guest paths start at the root.
    #[error("guest path {0:?} is not absolute: start it with /")]
    NotAbsolute(String),
    /// Empty, `.` and `..` components have no place in an image.
    #[error("guest path {0:?} is not plain: remove empty, `.` and `..` components")]
    NotPlain(String),
    /// Linux limits: 255 bytes per name, 4095 per path; NUL ends a name.
    #[error("guest path {0:?} has a name that Linux cannot hold")]
    TooLong(String),
    /// The path, or one above it, is already something else.
    #[error("guest path {0:?} is already taken")]
    Taken(String),
}

/// One file or directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Permission bits, `0o7777` at most.
    pub mode: u16,
    /// What it is.
    pub content: Content,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A directory; its entries are the nodes whose paths lie below it.
    Directory,
    /// A regular file with its bytes.
    File(Vec<u8>),
}

/// All nodes by path: without a leading `/`, parents before children, the root itself not listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// The nodes, parents before children.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// The bytes of the regular file at `path`.
    pub fn file(&self, path: &str) -> Option<&[u8]> {
        match self.nodes.get(path) {
            Some(Node {
                content: Content::File(bytes),
                ..
            }) => Some(bytes),
            _ => None,
        }
    }

    /// Adds an empty directory; an existing one gets the mode.
    ///
    /// # Errors
    /// A path that is no plain name, or that is a file already.
    pub fn add_directory(&mut self, path: &str, mode: u16) -> Result<(), PathError> {
        check(path)?;
        self.add_parents(path)?;
        match self.nodes.get_mut(path) {
            Some(Node {
                content: Content::File(_),
                ..
            }) => Err(PathError::Taken(absolute(path))),
            Some(node) => {
                node.mode = mode;
                Ok(())
            }
            None => {
                self.nodes.insert(
                    path.to_owned(),
                    Node {
                        mode,
                        content: Content::Directory,
                    },
                );
                Ok(())
            }
        }
    }

    /// Adds a regular file and the directories above it (mode 0755 where they are new).
    ///
    /// # Errors
    /// A path that is no plain name, or that exists already.
    pub fn add_file(&mut self, path: &str, mode: u16, bytes: Vec<u8>) -> Result<(), PathError> {
        check(path)?;
        self.add_parents(path)?;
        if self.nodes.contains_key(path) {
            return Err(PathError::Taken(absolute(path)));
        }
        self.nodes.insert(
            path.to_owned(),
            Node {
                mode,
                content: Content::File(bytes),
            },
        );
        Ok(())
    }

    fn add_parents(&mut self, path: &str) -> Result<(), PathError> {
        for (end, _) in path.match_indices('/') {
            let parent = &path[..end];
            match self.nodes.get(parent) {
                Some(Node {
                    content: Content::File(_),
                    ..
                }) => return Err(PathError::Taken(absolute(path))),
                Some(_) => {}
                None => {
                    self.nodes.insert(
                        parent.to_owned(),
                        Node {
                            mode: 0o755,
                            content: Content::Directory,
                        },
                    );
                }
            }
        }
        Ok(())
    }
}

/// Turns what a person wrote (`/etc/motd`) into a tree path (`etc/motd`).
///
/// # Errors
/// The path is not absolute.
pub fn from_absolute(path: &str) -> Result<&str, PathError> {
    path.strip_prefix('/')
        .ok_or_else(|| PathError::NotAbsolute(path.to_owned()))
}

/// The path as the guest sees it.
pub fn absolute(path: &str) -> String {
    format!("/{path}")
}

fn check(path: &str) -> Result<(), PathError> {
    if path.split('/').any(|name| matches!(name, "" | "." | "..")) {
        return Err(PathError::NotPlain(absolute(path)));
    }
    if path.len() > 4095 || path.split('/').any(|name| name.len() > 255) || path.contains('\0') {
        return Err(PathError::TooLong(absolute(path)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_made_and_come_first() {
        let mut tree = Tree::new();
        tree.add_file("a/b/c", 0o600, vec![1]).unwrap();
        tree.add_directory("a-b", 0o700).unwrap();
        let paths: Vec<_> = tree.iter().map(|(path, _)| path).collect();
        assert_eq!(paths, ["a", "a-b", "a/b", "a/b/c"]);
    }

    #[test]
    fn bad_paths_are_refused() {
        let mut tree = Tree::new();
        for path in ["", "/a", "a/", "a//b", ".", "a/../b"] {
            assert!(
                matches!(tree.add_file(path, 0o644, vec![]), Err(PathError::NotPlain(_))),
                "{path:?}"
            );
        }
        assert!(matches!(
            tree.add_file(&"n".repeat(256), 0o644, vec![]),
            Err(PathError::TooLong(_))
        ));
        assert!(matches!(from_absolute("etc"), Err(PathError::NotAbsolute(_))));
    }

    #[test]
    fn nothing_is_replaced() {
        let mut tree = Tree::new();
        tree.add_file("init", 0o755, vec![1]).unwrap();
        assert!(matches!(
            tree.add_file("init", 0o755, vec![2]),
            Err(PathError::Taken(_))
        ));
        assert!(matches!(
            tree.add_file("init/x", 0o755, vec![2]),
            Err(PathError::Taken(_))
        ));
        assert!(matches!(
            tree.add_directory("init", 0o755),
            Err(PathError::Taken(_))
        ));
        assert_eq!(tree.file("init"), Some(&[1][..]));
    }
}
