//! The report as text, for people.

use std::fmt;

use super::{
    Mode,
    latencies::LatencySummary,
    report::{Handshakes, Memory, Report, Slow, Traffic},
};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let setup = &self.setup;
        write!(f, "{:?} at {}: {} connections", setup.mode, setup.url, setup.connections)?;
        match (setup.mode, setup.rate, setup.in_flight) {
            (Mode::Idle, ..) => writeln!(f)?,
            (_, Some(rate), _) => writeln!(f, ", {} senders, {rate} messages/s", setup.senders)?,
            (_, None, in_flight) => {
                writeln!(f, ", {} senders, {} in flight", setup.senders, in_flight.unwrap_or(0))?;
            }
        }
        let parts: [Option<&dyn fmt::Display>; 4] = [
            self.traffic.as_ref().map(|traffic| traffic as _),
            self.slow.as_ref().map(|slow| slow as _),
            self.handshakes.as_ref().map(|handshakes| handshakes as _),
            self.memory.as_ref().map(|memory| memory as _),
        ];
        parts.into_iter().flatten().try_for_each(|part| part.fmt(f))?;
        if let Some(ends) = &self.ends {
            let ends: Vec<_> = ends.iter().map(|(end, count)| format!("{end}: {count}")).collect();
            writeln!(f, "  ends            {}", ends.join(", "))?;
        }
        writeln!(f, "  disconnections  {}", self.disconnections)?;
        for cause in &self.causes {
            writeln!(f, "                  {cause}")?;
        }
        writeln!(f, "  verdict         {}", if self.is_faultless() { "faultless" } else { "FAULTY" })
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  deliveries/s    {:.0}", self.deliveries_per_second)?;
        writeln!(f, "  messages/s      {:.0}", self.messages_per_second)?;
        let (percent, received, expected) = (100.0 * self.delivery_ratio, self.received, self.expected);
        writeln!(f, "  delivered       {percent:.4} % ({received} of {expected})")?;
        writeln!(f, "  duplicates      {}", self.duplicates)?;
        writeln!(f, "  out of order    {}", self.order_violations)?;
        writeln!(f, "  strays          {}", self.strays)?;
        if self.sender_reorders > 0 {
            writeln!(f, "  reordered       {} within a sender (not a fault)", self.sender_reorders)?;
        }
        if self.unseen > 0 {
            writeln!(f, "  unseen          {} (sent, but received by no connection)", self.unseen)?;
        }
        if let Some(latency) = &self.latency {
            writeln!(f, "  latency µs      {latency}")?;
        }
        if let (Some(cost), Some(share), Some(waiting)) =
            (self.server_cpu_us_per_delivery, self.server_cpu_share, self.server_waiting_share)
        {
            let (share, waiting) = (100.0 * share, 100.0 * waiting);
            writeln!(
                f,
                "  server CPU      {cost:.3} µs per delivery, {share:.0} % of a core, {waiting:.0} % waiting for one"
            )?;
        }
        let limit = if self.client_was_the_limit { " — THE CLIENT WAS THE LIMIT" } else { "" };
        let (share, waiting) = (100.0 * self.client_cpu_share, 100.0 * self.client_waiting_share);
        writeln!(f, "  client CPU      {share:.0} % of a core, {waiting:.0} % waiting for one{limit}")
    }
}

impl fmt::Display for LatencySummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { p50_us, p99_us, max_us } = self;
        write!(f, "p50 {p50_us:.0}, p99 {p99_us:.0}, max {max_us:.0}")
    }
}

impl fmt::Display for Handshakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at_once, per_second, latency } = self;
        write!(f, "  handshakes/s    {per_second:.0}, {at_once} at once")?;
        match latency {
            Some(latency) => writeln!(f, "; µs: {latency}"),
            None => writeln!(f),
        }
    }
}

impl fmt::Display for Slow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (stalled, slow, rate) = (self.stalled, self.slow, self.slow_bytes_per_second);
        writeln!(f, "  slow readers    {stalled} stalled, {slow} at {rate} bytes/s")?;
        let (received, disconnected) = (self.received, self.disconnected);
        writeln!(
            f,
            "                  {received} messages received, {disconnected} disconnected (not a fault)"
        )
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let levels = |empty: u64, full: u64, peak: u64, end: Option<u64>| {
            let end = end.map_or("–".to_owned(), |end| (end / 1024).to_string());
            let (empty, full, peak) = (empty / 1024, full / 1024, peak / 1024);
            format!("{empty} KiB empty, {full} full, {peak} at most, {end} at the end")
        };
        let resident = levels(self.empty_bytes, self.full_bytes, self.peak_bytes, self.end_bytes);
        writeln!(f, "  memory          {resident}")?;
        let (bytes, descriptors) = (self.bytes_per_connection, self.descriptors_per_connection);
        writeln!(f, "                  {bytes:.0} bytes and {descriptors:.2} open files per connection")?;
        if let (Some(full), Some(end)) = (self.sockets_full_bytes, self.sockets_end_bytes) {
            let (full, end) = (full / 1024, end / 1024);
            writeln!(f, "  its sockets     {full} KiB full, {end} at the end, in the kernel")?;
        }
        let Some(kernel) = &self.kernel else { return Ok(()) };
        let levels = levels(kernel.empty_bytes, kernel.full_bytes, kernel.peak_bytes, kernel.end_bytes);
        writeln!(f, "  kernel's        {levels}")?;
        let (full, peak) = (kernel.bytes_per_connection, kernel.peak_bytes_per_connection);
        writeln!(
            f,
            "                  {full:.0} bytes per connection, {peak:.0} at most, for the sockets of both ends"
        )
    }
}
