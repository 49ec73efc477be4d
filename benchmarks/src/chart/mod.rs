//! Charts as SVG, with nothing from elsewhere: no script, no font, no image.
//!
//! A chart paints its own card, light or dark as the reader's system is, so its text is readable on any page. The
//! colours carry no meaning alone: every bar has its name and its value beside it, every line its name above.
//! Knows shapes and words. Does not know what was measured.

mod bar;
mod line;
mod span;

use std::fmt::{self, Write as _};

pub(crate) use self::{
    bar::{Bar, BarChart, Row},
    line::{Line, LineChart},
};

/// What all charts of a page share.
const WIDTH: f64 = 760.0;
const MARGIN: f64 = 24.0;
/// What fits into a line of small text on the card, in any of the fonts.
const NOTE_CHARACTERS: usize = 105;
/// From one line of small text to the next.
const LEADING: f64 = 18.0;

const STYLE: &str = "\
text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1f2328}\
.title{font-size:17px;font-weight:600}\
.soft{font-size:12px;fill:#59636e}\
.card{fill:#ffffff;stroke:#d1d9e0}\
.grid{stroke:#d1d9e0;stroke-width:1}\
.s0{fill:#7a8ca5}.s1{fill:#b4c0d0}\
.own.s0{fill:#c2410c}.own.s1{fill:#f08c4a}\
.faulty{fill-opacity:.35;stroke:#59636e;stroke-dasharray:4 3}\
.path{fill:none;stroke-width:2.5;stroke:#7a8ca5}.path.own{stroke:#c2410c}\
@media(prefers-color-scheme:dark){\
text{fill:#e6edf3}.soft{fill:#9aa4af}.card{fill:#0d1117;stroke:#3d444d}.grid{stroke:#30363d}\
.s0{fill:#7d8fa9}.s1{fill:#4d5b70}.own.s0{fill:#f0743a}.own.s1{fill:#a8481a}\
.faulty{stroke:#9aa4af}.path{stroke:#7d8fa9}.path.own{stroke:#f0743a}}";

/// What stands around a chart.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) title: String,
    /// What is shown, and which direction is good.
    pub(crate) subtitle: String,
    /// How it was measured, a line each.
    pub(crate) notes: Vec<String>,
}

/// The picture while it is drawn.
#[derive(Debug, Default)]
struct Canvas {
    body: String,
}

#[derive(Clone, Copy, Debug)]
enum Anchor {
    Start,
    Middle,
    End,
}

impl Frame {
    /// Where the drawing begins, below title and subtitle.
    fn top(&self) -> f64 {
        MARGIN + 48.0
    }

    /// Puts title, notes and card around a drawing that ends at `bottom`.
    fn close(&self, mut canvas: Canvas, bottom: f64) -> String {
        canvas.text(MARGIN, MARGIN + 12.0, Anchor::Start, "title", &self.title);
        canvas.text(MARGIN, MARGIN + 32.0, Anchor::Start, "soft", &self.subtitle);
        let mut foot = bottom + LEADING;
        for line in self.notes.iter().flat_map(|note| wrapped(note)) {
            canvas.text(MARGIN, foot, Anchor::Start, "soft", &line);
            foot += LEADING;
        }
        let height = foot;
        let title = Escaped(&self.title);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             height=\"{height}\" role=\"img\" aria-label=\"{title}\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n<rect class=\"card\" x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" \
             rx=\"8\"/>\n{}</svg>\n",
            WIDTH - 1.0,
            height - 1.0,
            canvas.body,
        )
    }
}

impl Canvas {
    fn text(&mut self, x: f64, y: f64, anchor: Anchor, class: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = Escaped(text);
        self.add(format_args!(
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, class: &str) {
        self.add(format_args!(
            "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"2\"/>"
        ));
    }

    fn grid(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        self.add(format_args!(
            "<line class=\"grid\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        ));
    }

    fn add(&mut self, element: fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.body, "{element}");
    }
}

/// A note in lines that fit; SVG breaks none itself.
fn wrapped(note: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in note.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= NOTE_CHARACTERS => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Text that is neither markup nor the end of an attribute.
#[derive(Debug)]
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '&' => f.write_str("&amp;")?,
                '"' => f.write_str("&quot;")?,
                plain => f.write_char(plain)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_note_is_broken_into_lines_that_fit() {
        let note = "word ".repeat(50);
        let lines = wrapped(&note);
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line.len() <= NOTE_CHARACTERS));
        assert_eq!(lines.join(" "), note.trim());
    }

    #[test]
    fn markup_in_a_name_stays_text() {
        let frame =
            Frame { title: "a < b & \"c\"".into(), subtitle: String::new(), notes: vec!["<n>".into()] };
        let svg = frame.close(Canvas::default(), 100.0);
        assert!(svg.contains("<title>a &lt; b &amp; &quot;c&quot;</title>"));
        assert!(svg.contains(">&lt;n&gt;</text>") && !svg.contains("<n>"));
    }
}
