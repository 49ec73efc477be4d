//! Durations in settings, as text: `5ms`, `15s`, `1h 30m`.
//!
//! For serde's `with`, one module for each field, because an error must name the field and serde does not. An
//! absent duration is the text `none`, so that formats without a null and environment variables can express
//! it; a null is read, too. Does not know the structs or their ranges.

use std::fmt;
use std::time::Duration;

use serde::de::{Deserializer, Error, Visitor};

macro_rules! durations {
    ($type:ty, $read:ident, $write:ident: $($field:ident)*) => {$(
        pub(crate) mod $field {
            use std::time::Duration;

            pub(crate) fn serialize<S: serde::Serializer>(value: &$type, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(&super::$write(*value))
            }

            pub(crate) fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<$type, D::Error> {
                super::$read(deserializer, stringify!($field))
            }
        }
    )*};
}

durations! { Duration, read, humantime_text: coalesce pong_timeout close_timeout presence_grace timeout max_rtt period }
durations! {
    Option<Duration>, read_optional, optional_text:
    blocked_after stall_timeout heartbeat_interval idle_timeout message_timeout max_connection_duration
}

/// The text of an absent duration.
const NONE: &str = "none";

fn humantime_text(value: Duration) -> impl fmt::Display {
    humantime::format_duration(value)
}

fn optional_text(value: Option<Duration>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| humantime_text(value).to_string())
}

fn read<'de, D: Deserializer<'de>>(deserializer: D, field: &'static str) -> Result<Duration, D::Error> {
    deserializer.deserialize_str(Text { field })
}

fn read_optional<'de, D: Deserializer<'de>>(
    deserializer: D,
    field: &'static str,
) -> Result<Option<Duration>, D::Error> {
    deserializer.deserialize_option(OptionalText(Text { field }))
}

struct Text {
    field: &'static str,
}

impl Visitor<'_> for Text {
    type Value = Duration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a text such as \"5ms\", \"15s\" or \"1h\" for `{}`", self.field)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Duration, E> {
        humantime::parse_duration(text).map_err(|error| {
            let field = self.field;
            E::custom(format_args!(
                "`{field}` is {text:?}, but must be a duration such as \"5ms\", \"15s\" or \"1h\": {error}"
            ))
        })
    }
}

struct OptionalText(Text);

impl<'de> Visitor<'de> for OptionalText {
    type Value = Option<Duration>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)?;
        write!(f, ", or {NONE:?}")
    }

    fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        if text == NONE { Ok(None) } else { self.0.visit_str(text).map(Some) }
    }
}
