//! The report as text, for people.

use std::fmt;

use super::{
    Mode,
    latency::Summary,
    report::{Churn, Kill, Memory, Report, Slow, Storm, Traffic},
};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let setup = &self.setup;
        write!(f, "{:?} at {}: {} connections", setup.mode, setup.url, setup.connections)?;
        match (setup.mode, setup.rate, setup.in_flight) {
            (Mode::Idle | Mode::Storm, ..) => writeln!(f)?,
            (_, Some(rate), _) => writeln!(f, ", {} senders, {rate} messages/s", setup.senders)?,
            (_, None, in_flight) => {
                writeln!(f, ", {} senders, {} in flight", setup.senders, in_flight.unwrap_or(0))?;
            }
        }
        if let Some(traffic) = &self.traffic {
            write!(f, "{traffic}")?;
        }
        let parts: [Option<&dyn fmt::Display>; 5] = [
            self.slow.as_ref().map(|slow| slow as _),
            self.kill.as_ref().map(|kill| kill as _),
            self.churn.as_ref().map(|churn| churn as _),
            self.storm.as_ref().map(|storm| storm as _),
            self.memory.as_ref().map(|memory| memory as _),
        ];
        for part in parts.into_iter().flatten() {
            write!(f, "{part}")?;
        }
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
            writeln!(f, "  unseen          {} (sent, and seen by nobody)", self.unseen)?;
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

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { p50_us, p99_us, max_us } = self;
        write!(f, "p50 {p50_us:.0}, p99 {p99_us:.0}, max {max_us:.0}")
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

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  killed          {}", self.killed)?;
        match self.max_gap_ms {
            Some(gap) => writeln!(f, "; the longest delivery around it took {gap:.1} ms"),
            None => writeln!(f, "; no delivery after it"),
        }
    }
}

impl fmt::Display for Churn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { joined, left, failed, deaf, .. } = self;
        writeln!(f, "  churn           {left} left, {joined} joined, {failed} failed, {deaf} deaf")?;
        if let Some(handshake) = &self.handshake {
            writeln!(f, "  handshake µs    {handshake}")?;
        }
        self.causes.iter().try_for_each(|cause| writeln!(f, "                  {cause}"))
    }
}

impl fmt::Display for Storm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at_once, rounds, opened, connections_per_second, .. } = self;
        writeln!(f, "  connections/s   {connections_per_second:.0}, {at_once} at once")?;
        writeln!(f, "  opened          {opened} in {rounds} rounds")?;
        if let Some(handshake) = &self.handshake {
            writeln!(f, "  handshake µs    {handshake}")?;
        }
        writeln!(f, "  closing         {:.1} ms for the slowest round", self.closing_ms_max)?;
        if let Some(cost) = self.server_cpu_us_per_connection {
            writeln!(f, "  server CPU      {cost:.1} µs per connection, closing included")?;
        }
        self.failures.iter().try_for_each(|(cause, count)| writeln!(f, "  failed          {count}: {cause}"))
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = |bytes: Option<u64>| bytes.map_or("–".to_owned(), |bytes| (bytes / 1024).to_string());
        let levels = |empty, full, peak, end| {
            let (empty, full, peak, end) = (level(empty), level(full), level(peak), level(end));
            format!("{empty} KiB empty, {full} full, {peak} at most, {end} at the end")
        };
        let resident = levels(Some(self.empty_bytes), Some(self.full_bytes), self.peak_bytes, self.end_bytes);
        writeln!(f, "  memory          {resident}")?;
        writeln!(f, "                  {:.0} bytes per connection", self.bytes_per_connection)?;
        if let (Some(full), Some(end)) = (self.sockets_full_bytes, self.sockets_end_bytes) {
            let (full, end) = (full / 1024, end / 1024);
            writeln!(f, "  its sockets     {full} KiB full, {end} at the end, in the kernel")?;
        }
        let Some(kernel) = &self.kernel else { return Ok(()) };
        let (empty, full) = (Some(kernel.empty_bytes), Some(kernel.full_bytes));
        writeln!(f, "  kernel's        {}", levels(empty, full, Some(kernel.peak_bytes), kernel.end_bytes))?;
        let (full, peak) = (kernel.bytes_per_connection, kernel.peak_bytes_per_connection);
        writeln!(
            f,
            "                  {full:.0} bytes per connection, {peak:.0} at most, for the sockets of both ends"
        )
    }
}
