//! The words between `{{` and `}}` in a snapshotter's mounts: they stand for something of a mount that comes before.
//!
//! containerd's mount manager (2.2 and later, core/mount/manager/format.go) knows four: `source N` and `target N` are
//! members of the mount with that index, `mount N` is where it is mounted, `overlay A B` is where all from A to B are,
//! in that order, as a list of lower directories. Here a place is a path relative to the container's storage directory
//! in the guest.

use super::error::StorageError;

/// What templates can name of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    /// Its source, as it was given.
    pub source: String,
    /// Its target, as it was given.
    pub target: String,
    /// Where the guest mounts it: relative, without `:`.
    pub place: String,
}

/// Whether a text has templates at all.
pub(super) fn is_template(text: &str) -> bool {
    text.contains("{{")
}

/// Puts what they stand for in place of the templates of a text. `before` are the mounts that come before.
///
/// # Errors
/// [`StorageError::Template`] for words that are not known, and for an index of a mount that does not come before.
pub(super) fn expand(text: &str, before: &[Named]) -> Result<String, StorageError> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((literal, tail)) = rest.split_once("{{") {
        let refuse = |reason: String| StorageError::Template {
            text: text.to_owned(),
            reason,
        };
        let (words, tail) = tail
            .split_once("}}")
            .ok_or_else(|| refuse("`}}` is missing".to_owned()))?;
        expanded.push_str(literal);
        expanded.push_str(&value(words, before).map_err(refuse)?);
        rest = tail;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn value(words: &str, before: &[Named]) -> Result<String, String> {
    let words: Vec<&str> = words.split_whitespace().collect();
    let number = |word: &str| {
        word.parse::<i64>()
            .map_err(|_| format!("{word:?} is not an index"))
            .and_then(|index| {
                usize::try_from(index)
                    .ok()
                    .filter(|index| *index < before.len())
                    .ok_or_else(|| match before.len() {
                        0 => format!("the index {index} is of no mount before this one: it is the first"),
                        count => format!(
                            "the index {index} is of no mount before this one: they are 0 to {}",
                            count - 1
                        ),
                    })
            })
    };
    match words[..] {
        ["source", index] => Ok(before[number(index)?].source.clone()),
        ["target", index] => Ok(before[number(index)?].target.clone()),
        ["mount", index] => Ok(before[number(index)?].place.clone()),
        ["overlay", first, last] => {
            let (first, last) = (number(first)?, number(last)?);
            let mut places: Vec<&str> = before[first.min(last)..=first.max(last)]
                .iter()
                .map(|named| named.place.as_str())
                .collect();
            if first > last {
                places.reverse();
            }
            Ok(places.join(":"))
        }
        _ => Err(format!(
            "{:?} is none of `source N`, `target N`, `mount N`, `overlay A B`",
            words.join(" ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn before(count: usize) -> Vec<Named> {
        (0..count)
            .map(|index| Named {
                source: format!("/snap/{index} with space:colon/layer.erofs"),
                target: format!("/t{index}"),
                place: format!("m{index}"),
            })
            .collect()
    }

    #[test]
    fn each_word_stands_for_its_part_of_an_earlier_mount() {
        for (text, expected) in [
            ("plain }} text", "plain }} text"),
            ("{{ mount 0 }}/upper", "m0/upper"),
            ("{{mount 2}}", "m2"),
            ("{{ source 1 }}", "/snap/1 with space:colon/layer.erofs"),
            ("{{ target 2 }}", "/t2"),
            ("lowerdir={{ overlay 0 2 }}", "lowerdir=m0:m1:m2"),
            ("lowerdir={{ overlay 2 1 }}:{{ mount 0 }}", "lowerdir=m2:m1:m0"),
            ("{{ overlay 1 1 }}", "m1"),
        ] {
            assert_eq!(expand(text, &before(3)).unwrap(), expected);
        }
    }

    #[test]
    fn an_index_must_be_of_an_earlier_mount() {
        for (text, words) in [
            (
                "{{ mount 3 }}",
                "the index 3 is of no mount before this one: they are 0 to 2",
            ),
            ("{{ overlay 0 3 }}", "the index 3"),
            ("{{ source -1 }}", "the index -1"),
            ("{{ mount 99999999999999999999 }}", "is not an index"),
            ("{{ mount x }}", "\"x\" is not an index"),
            ("{{ mount }}", "\"mount\" is none of"),
            ("{{ exec 1 }}", "\"exec 1\" is none of"),
            ("{{ mount 0", "`}}` is missing"),
            ("{{}}", "\"\" is none of"),
        ] {
            let error = expand(text, &before(3)).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains(text), "{error}");
        }
        let error = expand("{{ mount 0 }}", &[]).unwrap_err().to_string();
        assert!(error.contains("it is the first"), "{error}");
    }

    #[test]
    fn what_a_template_stands_for_is_no_template() {
        let named = Named {
            source: "{{ source 0 }}".into(),
            target: String::new(),
            place: "m0".into(),
        };
        assert_eq!(expand("{{ source 0 }}", &[named]).unwrap(), "{{ source 0 }}");
    }
}
