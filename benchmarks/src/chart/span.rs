//! A span: which values an axis shows, and where on it a value lies.

/// From where to where, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Span {
    /// From nothing to `max`.
    Linear { max: f64, step: f64 },
    /// From one power of ten to another.
    Log { from: i32, to: i32 },
}

impl Span {
    /// From nothing to at least the greatest of `values`, in four or five round steps.
    pub(crate) fn linear(values: impl Iterator<Item = f64>) -> Self {
        let greatest = values.fold(0.0, f64::max);
        let rough = if greatest > 0.0 { greatest / 5.0 } else { 0.2 };
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|digit| digit * power);
        let step = step.into_iter().find(|&step| step >= rough * 0.999).unwrap_or(10.0 * power);
        Self::Linear { max: step * (greatest / step).ceil().max(1.0), step }
    }

    /// Whole powers of ten around the `values` above zero; a bar of the least is not invisible.
    pub(crate) fn log(values: impl Iterator<Item = f64>) -> Self {
        let (mut least, mut greatest) = (f64::INFINITY, 0.0f64);
        for value in values.filter(|value| *value > 0.0) {
            (least, greatest) = (least.min(value), greatest.max(value));
        }
        if greatest == 0.0 {
            return Self::Log { from: 0, to: 1 };
        }
        // A value at a power of ten would have no length, so the axis begins below it.
        let from = (least / 1.5).log10().floor() as i32;
        Self::Log { from, to: (greatest.log10().ceil() as i32).max(from + 1) }
    }

    /// How far along the axis, from 0 to 1. What a logarithm does not know lies at the beginning.
    pub(crate) fn place(self, value: f64) -> f64 {
        let place = match self {
            Self::Linear { max, .. } => value / max,
            Self::Log { .. } if value <= 0.0 => 0.0,
            Self::Log { from, to } => (value.log10() - f64::from(from)) / f64::from(to - from),
        };
        place.clamp(0.0, 1.0)
    }

    /// Values worth a line.
    pub(crate) fn ticks(self) -> Vec<f64> {
        match self {
            Self::Linear { max, step } => {
                (0..=(max / step).round() as i32).map(|count| step * f64::from(count)).collect()
            }
            Self::Log { from, to } => (from..=to).map(|power| 10f64.powi(power)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_span_begins_at_nothing_and_ends_at_a_round_value() {
        let span = Span::linear([0.29e6, 14.8e6].into_iter());
        assert_eq!(span, Span::Linear { max: 15e6, step: 5e6 });
        assert_eq!(span.ticks(), [0.0, 5e6, 10e6, 15e6]);
        assert_eq!((span.place(0.0), span.place(7.5e6)), (0.0, 0.5));
        assert!(matches!(Span::linear([0.0].into_iter()), Span::Linear { max, .. } if max > 0.0));
    }

    #[test]
    fn a_logarithmic_span_covers_all_values_and_none_has_no_length() {
        let span = Span::log([100.0, 137_000.0].into_iter());
        assert_eq!(span, Span::Log { from: 1, to: 6 });
        assert!(span.place(100.0) > 0.0 && span.place(137_000.0) < 1.0);
        assert_eq!((span.place(0.0), span.place(-1.0)), (0.0, 0.0));
        assert_eq!(Span::log(std::iter::empty()), Span::Log { from: 0, to: 1 });
    }
}
