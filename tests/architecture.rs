//! The rules of ARCHITECTURE.md, held against the sources.
//!
//! What a compiler does not check and a reader soon would not believe any more: who imports whom, which words
//! the engine does not say, where locks, clocks, globals and `unsafe` may stand. It reads text, with comments and
//! strings taken out, and nothing is compiled. A rule that must be broken would get its exception here, where
//! everybody sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The crates whose modules have ranks: their folder, and the heading of their table in ARCHITECTURE.md.
const CRATES: [(&str, &str); 3] = [
    ("engine/src", "### engine/src, from the ground up"),
    ("src", "### src, on top of it"),
    ("backplane/src", "### backplane/src, beside them"),
];

/// What is written for people, besides the [chapters] of the guide.
const DOCUMENTS: [&str; 9] = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/GUARANTEES.md",
    "engine/README.md",
    "backplane/README.md",
    "src/guide.md",
];

/// The front page of the guide, which is also the documentation of the crate `shardcast`.
const GUIDE: &str = "src/guide.md";

/// The folder of the guide's chapters, which are also modules of the documentation.
const CHAPTERS: &str = "src/guide";

/// Module → its rank. A module imports only modules of a lower rank.
type Ranks = BTreeMap<String, usize>;

#[test]
fn a_module_imports_only_modules_of_a_lower_rank() {
    let document = read(&root().join("ARCHITECTURE.md"));
    let mut found = Vec::new();
    for (folder, heading) in CRATES {
        for (module, import) in upward(&ranks(&document, heading), &modules(folder)) {
            found.push(format!("{folder}: `{module}` imports `{import}`, whose rank is not lower"));
        }
    }
    assert_none(&found);
}

#[test]
fn the_code_map_lists_every_module_and_file() {
    let document = read(&root().join("ARCHITECTURE.md"));
    for (folder, heading) in CRATES {
        let there: BTreeSet<String> = modules(folder).into_keys().filter(|module| module != "lib").collect();
        let listed: BTreeSet<String> = ranks(&document, heading).into_keys().collect();
        assert_eq!(there, listed, "{folder}: the modules there (left) and in the table (right) differ");
        let table = table(&document, heading);
        let parts = sources(&[folder]).into_iter().filter(|path| path.parent() != Some(&root().join(folder)));
        for path in parts.filter(|path| !path.ends_with("tests.rs")) {
            let file = path.file_name().expect("a source has a name").to_string_lossy().into_owned();
            assert!(table.contains(&format!("— `{file}`")), "the table lacks {}", name(&path));
        }
    }
}

#[test]
fn the_engine_does_not_say_the_words_of_the_crate_above_it() {
    const NEVER: [&str; 5] = ["axum", "hub", "hubs", "json", "tokio"];
    // In prose these may stand, for instance to say that the engine does not know them.
    const NOT_AS_CODE: [&str; 5] = ["codec", "http", "hyper", "postcard", "futures"];
    let mut found = Vec::new();
    for path in sources(&["engine/src"]) {
        let text = read(&path);
        found.extend(
            words(&text).filter(|word| NEVER.contains(&word.as_str())).map(|word| says(&path, &word)),
        );
        let code = code_of(&text);
        let forbidden = words(&code).filter(|word| NOT_AS_CODE.contains(&word.as_str()));
        found.extend(forbidden.map(|word| says(&path, &word)));
    }
    // And its tests are built without them.
    for manifest in ["engine/Cargo.toml", "testkit/Cargo.toml"] {
        let text = read(&root().join(manifest));
        found.extend(
            words(section(&text, "[dependencies]"))
                .filter(|word| NEVER.contains(&word.as_str()) || NOT_AS_CODE.contains(&word.as_str()))
                .map(|word| format!("{manifest} depends on something with `{word}` in its name")),
        );
    }
    assert_none(&found);
}

#[test]
fn no_name_is_a_metaphor_that_needs_a_glossary() {
    // The field has words for these; CONTRIBUTING.md's glossary lists them.
    const NEVER: [&str; 18] = [
        "bout", "clerk", "crowd", "deaf", "desk", "entrance", "entrant", "face", "gulp", "ledger",
        "newcomer", "office", "parcel", "patience", "sip", "tenant", "vanished", "workshop",
    ];
    let folders = [
        "engine/src",
        "engine/examples",
        "engine/tests",
        "backplane",
        "src",
        "examples",
        "tests",
        "benches",
        "testkit",
    ];
    let mut found = Vec::new();
    for path in sources(&folders) {
        let code = code_of(&read(&path));
        found.extend(
            words(&code).filter(|word| NEVER.contains(&word.as_str())).map(|word| says(&path, &word)),
        );
    }
    found.dedup();
    assert_none(&found);
}

#[test]
fn what_is_dangerous_stands_in_few_places() {
    let rules: [(&str, &[&str]); 8] = [
        ("unsafe", &["engine/src/log.rs", "engine/src/outq.rs", "engine/src/trim.rs"]),
        // A guard of the map must not outlive the function that took it; so there is one file to look at.
        ("papaya::", &["engine/src/directory.rs"]),
        // Nothing is locked on the hot path: waiting publishers, namespaces' names, the end, the short form, the client.
        (
            "Mutex",
            &[
                "engine/src/admission.rs",
                "engine/src/beacon.rs",
                // For connections with a user that join, leave, open and end; no message takes it.
                "engine/src/directory.rs",
                "engine/src/receipt.rs",
                "engine/src/shutdown.rs",
                "engine/src/sync.rs",
                // For connections with a user that open; no message takes it.
                "engine/src/user_limits.rs",
                "engine/src/wait_list.rs",
                // Between a node's appender and its reader, for each batch.
                "backplane/src/cluster_log.rs",
                // For tests.
                "backplane/src/memory.rs",
                // For the names of hubs, when one is made.
                "src/backplane/cluster.rs",
                // For users who join and leave on any node, and who ask; no message takes it.
                "src/backplane/hub_state.rs",
                "src/client/callback.rs",
                "src/client/inbox.rs",
                "src/client/queue.rs",
                "src/serve_hub.rs",
                // tokio's, never contended.
                "src/stateful_hub.rs",
                // In tests of applications: what clients have received.
                "src/testing/server.rs",
                "src/testing/transcript.rs",
                // Between a shard and one reader, for one push or pop.
                "src/ws/socket.rs",
            ],
        ),
        ("RwLock", &[]),
        // Everything else is told what time it is.
        (
            "Instant::now",
            &[
                "engine/src/engine.rs",
                "engine/src/shard.rs",
                "engine/src/shard/shutdown.rs",
                "engine/src/watchdog.rs",
                // tokio's clock: the deadlines of receipts, and how long reading the shared log has waited.
                "src/backplane/cluster.rs",
                "src/backplane/ingest.rs",
                // The timeouts of a socket that was upgraded without them.
                "src/handler.rs",
                // How long a client's connection was open.
                "src/client/task.rs",
                // tokio's clock, by which an engine in memory is driven, and the deadlines of a test's assertions.
                "src/testing/client.rs",
                "src/testing/driver.rs",
                "src/testing/waiting.rs",
                "src/testing/wire.rs",
            ],
        ),
        // Nothing is global but the default engine, what `serve_hub` shares, the times of the last lines in the log, how many clients that are
        // turned away are waited for, and a thread's own count, turn and buffer.
        (
            "static ",
            &[
                "engine/src/engine_core.rs",
                // A thread's own.
                "engine/src/frame.rs",
                // A thread's own.
                "engine/src/socket/tls.rs",
                // A thread's own, for a bench.
                "engine/src/sync/counted.rs",
                "src/default_engine.rs",
                // A thread's own.
                "src/hub_handler.rs",
                "src/log_limit.rs",
                "src/serve_hub.rs",
                // A thread's own.
                "src/testing/driver.rs",
                "src/turn_away.rs",
            ],
        ),
        // Only whether a handler has sent something during a call, and to its own shard, where frames are built and
        // records decrypted, what a bench counts, a shard's values of hubs without fields, and the shards that a test
        // drives on its own thread.
        (
            "thread_local!",
            &[
                "engine/src/engine_core.rs",
                "engine/src/frame.rs",
                "engine/src/socket/tls.rs",
                "engine/src/sync/counted.rs",
                "src/hub_handler.rs",
                "src/testing/driver.rs",
            ],
        ),
        ("thread::sleep", &[]),
    ];
    let mut found = Vec::new();
    for path in sources(&["engine/src", "src", "backplane/src"]) {
        let code = product_code_of(&read(&path));
        for (word, allowed) in rules {
            if contains_word(&code, word) && !allowed.contains(&name(&path).as_str()) {
                found.push(format!("{}: `{}` may not stand here", name(&path), word.trim()));
            }
        }
    }
    assert_none(&found);
}

#[test]
fn every_file_begins_with_its_door_sign() {
    let folders = [
        "engine/src",
        "engine/examples",
        "engine/tests",
        "src",
        "examples",
        "tests",
        "benches",
        "benchmarks/src",
        "testkit",
    ];
    let mut found = Vec::new();
    for path in sources(&folders) {
        if !read(&path).starts_with("//! ") {
            found.push(format!("{} does not begin with `//! `", name(&path)));
        }
    }
    assert_none(&found);
}

#[test]
fn no_file_is_named_after_nothing() {
    const NOTHING: [&str; 9] =
        ["util", "utils", "common", "helper", "helpers", "manager", "misc", "shared", "types"];
    let folders = ["engine", "backplane", "src", "examples", "tests", "benches", "benchmarks/src", "testkit"];
    let is_nothing = |path: &PathBuf| {
        let mut names = path.strip_prefix(root()).into_iter().flat_map(Path::components);
        names.any(|part| NOTHING.contains(&part.as_os_str().to_string_lossy().trim_end_matches(".rs")))
    };
    let found: Vec<String> =
        sources(&folders).iter().filter(|path| is_nothing(path)).map(|path| name(path)).collect();
    assert_none(&found);
}

#[test]
fn an_example_is_built_without_what_the_tests_depend_on() {
    let (manifest, examples) = (read(&root().join("Cargo.toml")), read(&root().join("examples/Cargo.toml")));
    assert!(
        manifest.contains("autoexamples = false") && !manifest.contains("[[example]]"),
        "it has dev-dependencies"
    );
    assert!(!examples.contains("dev-dependencies"), "every example is compiled with them");
}

#[test]
fn the_tests_and_files_that_the_documents_name_exist() {
    let folders = ["engine", "backplane", "src", "examples", "tests", "benches", "benchmarks/src", "testkit"];
    let all: String = sources(&folders).iter().map(|path| read(path)).collect();
    let mut found = Vec::new();
    for document in documents() {
        let text = read(&root().join(&document));
        for name in text.lines().flat_map(|line| line.split('`').skip(1).step_by(2)) {
            let is_source = name.contains('/') && name.ends_with(".rs") && !name.contains(' ');
            let is_script = name.starts_with("ci/") || name.starts_with(".ci/");
            let path = name.split(' ').next().unwrap_or_default();
            if (is_source || is_script) && !root().join(path).exists() {
                found.push(format!("{document} names the file `{name}`, which is not there"));
            }
            let is_test = name.matches('_').count() >= 4
                && !name.contains(|letter: char| !letter.is_alphanumeric() && letter != '_');
            if is_test && !all.contains(&format!("fn {name}(")) {
                found.push(format!("{document} names the test `{name}`, which is not there"));
            }
        }
    }
    assert_none(&found);
}

#[test]
fn links_between_the_documents_lead_to_files_and_headings_that_exist() {
    let mut found = Vec::new();
    for document in documents() {
        let path = root().join(&document);
        let folder = path.parent().expect("a document is in a folder");
        let text = prose_of(&read(&path));
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, heading) =
                target.split_once('#').map_or((target, None), |(file, id)| (file, Some(id)));
            // Other servers are not asked, and rustdoc checks its own links.
            if target.contains("://")
                || (!file.is_empty() && !file.contains(['/', '.']))
                || file.contains("::")
            {
                continue;
            }
            let other = if file.is_empty() { path.clone() } else { folder.join(file) };
            let leads_somewhere = other.exists()
                && heading.is_none_or(|heading| headings(&read(&other)).iter().any(|id| id == heading));
            if !leads_somewhere {
                found.push(format!("{document} links to `{target}`, which does not exist"));
            }
        }
    }
    assert_none(&found);
}

#[test]
fn links_to_a_heading_of_the_guide_lead_to_one_that_exists() {
    // Rustdoc checks that the chapter exists, and does not look at what is behind the `#`.
    let front = headings(&read(&root().join(GUIDE)));
    let chapters: BTreeMap<String, Vec<String>> =
        chapters().into_iter().map(|(module, path)| (module, headings(&read(&path)))).collect();
    let texts = sources(&["src"]).into_iter().chain(documents().into_iter().map(|path| root().join(path)));
    let mut found = Vec::new();
    for path in texts {
        // Not in code blocks of a document; in a source, the documentation is in comments.
        let text = read(&path);
        let text =
            if path.extension().is_some_and(|extension| extension == "md") { prose_of(&text) } else { text };
        for (target, heading) in links_with_a_heading(&text) {
            let target = target.trim_start_matches("crate::").trim_start_matches("guide::");
            let there = if target == "crate" { Some(&front) } else { chapters.get(target) };
            if there.is_some_and(|there| !there.iter().any(|id| id == heading)) {
                found.push(format!("{} links to `{target}#{heading}`, which does not exist", name(&path)));
            }
        }
    }
    assert_none(&found);
}

#[test]
fn the_guide_lists_every_chapter() {
    let (front, modules) = (read(&root().join(GUIDE)), read(&root().join("src/guide.rs")));
    let mut found = Vec::new();
    for (module, path) in chapters() {
        let file = name(&path);
        if !modules.contains(&format!("(\"{}\")", file.trim_start_matches("src/"))) {
            found.push(format!("src/guide.rs does not include {file}"));
        }
        // A page inside a chapter is listed by its chapter.
        let parent = module.rsplit_once("::").map(|(parent, _)| parent.to_owned());
        let (list, link) = match &parent {
            None => (front.clone(), format!("(guide::{module})")),
            Some(parent) => (read(&root().join(format!("{CHAPTERS}/{parent}.md"))), format!("({module})")),
        };
        if !list.contains(&link) {
            found.push(format!("{file} is listed nowhere: `{link}` is missing"));
        }
    }
    assert_none(&found);
}

#[test]
fn the_guide_explains_every_reason_for_a_close() {
    let reasons = read(&root().join("engine/src/close_reason.rs"));
    let names = part_of(&reasons, "fn name(", "}\n    }");
    let chapter = read(&root().join(CHAPTERS).join("close_codes.md"));
    let found: Vec<String> = names
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Self::"))
        .map(|line| line.chars().take_while(|letter| letter.is_alphanumeric()).collect::<String>())
        .filter(|reason| !chapter.contains(&format!("CloseReason::{reason}")))
        .map(|reason| format!("close_codes.md does not explain `CloseReason::{reason}`"))
        .collect();
    assert!(names.contains("Self::Peer"), "the names of the reasons were not found");
    assert_none(&found);
}

#[test]
fn what_the_guide_shows_of_the_configuration_for_nginx_is_in_the_file() {
    let statements = |text: &str| -> BTreeSet<String> {
        let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let text = lines.collect::<Vec<_>>().join(" ");
        let each =
            text.split([';', '{', '}']).map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
        each.filter(|statement| !statement.is_empty()).collect()
    };
    let chapter = read(&root().join(CHAPTERS).join("deployment.md"));
    let shown = statements(part_of(part_of(&chapter, "# nginx", "\n# "), "```text\n", "```"));
    let file = statements(&read(&root().join("docs/deploy/nginx.conf")));
    assert!(shown.len() > 10, "the chapter shows little: {shown:?}");
    let found: Vec<String> =
        shown.difference(&file).map(|statement| format!("nginx.conf lacks `{statement}`")).collect();
    assert_none(&found);
}

#[test]
fn a_log_line_that_the_guide_quotes_is_logged() {
    let sources: String = sources(&["engine/src", "src"]).iter().map(|path| read(path)).collect();
    // A string that continues on the next line.
    let sources: String = sources
        .split("\\\n")
        .enumerate()
        .map(|(at, part)| if at == 0 { part } else { part.trim_start() })
        .collect();
    let mut found = Vec::new();
    for (_, path) in chapters() {
        let text = read(&path);
        for line in
            lines_with_a_level(&text).filter(|line| !sources.contains(line.trim_end_matches(['…', ' '])))
        {
            found.push(format!("{} quotes the log line `{line}`, which is not in the sources", name(&path)));
        }
    }
    assert_none(&found);
}

#[test]
fn the_documents_use_the_words_of_the_field() {
    // "connected", "disconnected", "slow", "must" and "`shardcast`" are the words instead.
    const NEVER: [&str; 10] = [
        "the face",
        "crowd",
        "guest",
        "newcomer",
        "who is behind",
        "has come",
        "has gone",
        "have gone",
        "is to be",
        "are to be",
    ];
    let mut found = Vec::new();
    for document in documents() {
        // Not in what is quoted as code.
        let text = prose_of(&read(&root().join(&document))).replace('\n', " ");
        let prose: String = text.split('`').step_by(2).collect::<Vec<_>>().join("`").to_lowercase();
        let said = NEVER.iter().filter(|words| prose.contains(*words));
        found.extend(said.map(|words| says(&root().join(&document), words)));
    }
    assert_none(&found);
}

// ---- the rules' own tests: that they can fail

#[test]
fn an_import_upwards_is_found_in_every_spelling() {
    let table = "### x\n| rank | file | what |\n|--:|---|---|\n| 1 | `ground.rs` | |\n| 1 | `equal.rs` | |\n\
                 | 2 | `middle.rs` | and in `middle/`: |\n|    | — `part.rs` | |\n| 3 | `top.rs` | |\n### y\n";
    let ranks = ranks(table, "### x");
    assert_eq!(ranks.len(), 4);
    let find = |module: &str, text: &str| {
        upward(
            &ranks,
            &BTreeMap::from([
                ("lib".to_owned(), "pub use top::Thing;\npub use middle::{A, B as C};".to_owned()),
                (module.to_owned(), text.to_owned()),
            ]),
        )
    };
    for text in [
        "use crate::top::Thing;",
        "use crate::{ground::G, top::{self, Thing}};",
        "use crate::{\n    ground::G,\n    top,\n};",
        "fn f() -> crate::top::Thing {}",
        "fn f() -> crate::Thing {}",
        "use super::top::Thing;",
    ] {
        assert_eq!(find("middle", text), [("middle".to_owned(), "top".to_owned())], "{text}");
    }
    assert_eq!(find("ground", "use crate::equal::E;").len(), 1, "equals do not know each other");
    assert_eq!(find("ground", "use crate::C;").len(), 1);
    for text in [
        "// use crate::top::Thing;",
        "/// [`crate::top`]",
        "\"crate::top\"",
        "use crate::ground::G;",
        "use super::Local;",
    ] {
        assert!(find("middle", text).is_empty(), "{text}");
    }
}

#[test]
fn a_heading_is_found_by_the_link_to_it_and_not_in_code() {
    let text = "# The end\n```\n# hidden\n```\n## TLS and HTTP/2\n`#no`\n### 1. Total order, `Block`\n";
    assert_eq!(headings(text), ["the-end", "tls-and-http2", "1-total-order-block"]);
    assert!(!prose_of(text).contains("hidden"));
}

#[test]
fn a_quoted_log_line_is_found_by_its_level() {
    let text = "log `one two` (warn) and ``three `four` `` (error), `five` (six)\n";
    let mut found: Vec<&str> = lines_with_a_level(text).collect();
    found.sort();
    assert_eq!(found, ["one two", "three `four`"]);
}

#[test]
fn comments_and_strings_are_no_code() {
    let text = "a /* b /* c */ d */ e // f\n\"g \\\" h\" i r#\"j \" k\"# l 'm' '\\'' n<'o> b\"p\" /// q\nr";
    let code: Vec<String> = words(&code_of(text)).collect();
    assert_eq!(code, ["a", "e", "i", "l", "n", "o", "r"]);
}

#[test]
fn modules_for_tests_are_no_product() {
    let text = "a\n#[cfg(test)]\n#[allow(x)]\nmod tests {\n    b {}\n}\nc\n#[cfg(test)]\nmod tests;\nd\n";
    let code: Vec<String> = words(&product_code_of(text)).collect();
    assert_eq!(code, ["a", "c", "d"]);
}

#[test]
fn a_word_is_found_inside_a_name_but_not_inside_a_word() {
    let seen: Vec<String> = words("JsonCodec serve_hub github HTTPServer").collect();
    assert_eq!(seen, ["json", "codec", "serve", "hub", "github", "http", "server"]);
    assert!(contains_word("unsafe { x }", "unsafe") && !contains_word("UnsafeCell unsafe_code", "unsafe"));
    assert!(contains_word("    static X: u8 = 0;", "static ") && !contains_word("&'static str", "static "));
}

// ---- reading sources

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A path as a person says it.
fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).to_string_lossy().replace('\\', "/")
}

fn says(path: &Path, word: &str) -> String {
    format!("{} says `{word}`", name(path))
}

#[track_caller]
fn assert_none(found: &[String]) {
    assert!(found.is_empty(), "\n  {}\n", found.join("\n  "));
}

/// [`DOCUMENTS`], and the chapters of the guide.
fn documents() -> Vec<String> {
    let chapters = chapters().into_values().map(|path| name(&path));
    DOCUMENTS.into_iter().map(str::to_owned).chain(chapters).collect()
}

/// The modules of the guide's chapters, such as `users` and `coming_from::signalr`, and their files.
fn chapters() -> BTreeMap<String, PathBuf> {
    let folder = root().join(CHAPTERS);
    let module = |path: &Path| {
        let inside = path.strip_prefix(&folder).expect("a chapter is in its folder").with_extension("");
        inside.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("::")
    };
    files(&[CHAPTERS], "md").into_iter().map(|path| (module(&path), path)).collect()
}

/// The links `[text](target#heading)` of a text, except those within one document.
fn links_with_a_heading(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.filter_map(|target| target.split_once('#')).filter(|(target, _)| !target.is_empty())
}

/// The part of a text from `start` to `end`.
fn part_of<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    text.split(start).nth(1).and_then(|rest| rest.split(end).next()).unwrap_or_default()
}

/// What is quoted as code before the level of a log line, as in "`text` (warn)".
fn lines_with_a_level(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| {
        ["(error)", "(warn)", "(info)", "(debug)"]
            .into_iter()
            .flat_map(|level| line.match_indices(level))
            .filter_map(|(at, _)| {
                let before = line[..at].trim_end();
                let fence = if before.ends_with("``") { "``" } else { "`" };
                let (_, quoted) = before.strip_suffix(fence)?.rsplit_once(fence)?;
                Some(quoted.trim())
            })
    })
}

/// All Rust files under the folders, those that exist.
fn sources(folders: &[&str]) -> Vec<PathBuf> {
    files(folders, "rs")
}

/// All files with the extension under the folders, those that exist.
fn files(folders: &[&str], extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("a folder can be listed").path();
            if path.is_dir() && !path.ends_with("target") {
                open.push(path);
            } else if path.extension().is_some_and(|its| its == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no .{extension} in {folders:?}");
    found
}

/// A document without its blocks of code.
fn prose_of(document: &str) -> String {
    let mut is_code = false;
    let mut prose = String::new();
    for line in document.lines() {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        if !is_code && !is_fence {
            prose.push_str(line);
            prose.push('\n');
        }
    }
    prose
}

/// What a link to each heading of a document has behind its `#`.
fn headings(document: &str) -> Vec<String> {
    let prose = prose_of(document);
    let titles = prose.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_matches(['#', ' ']));
    let kept = |letter: char| match letter {
        ' ' => Some('-'),
        _ => (letter.is_alphanumeric() || "-_".contains(letter)).then_some(letter),
    };
    titles.map(|title| title.to_lowercase().chars().filter_map(kept).collect()).collect()
}

/// The part of a document from a heading to the next.
fn table<'a>(document: &'a str, heading: &str) -> &'a str {
    let start = document.find(&format!("{heading}\n")).unwrap_or_else(|| panic!("no heading {heading}"));
    document[start + heading.len()..].split("\n#").next().unwrap_or_default()
}

/// The ranks in the table below a heading: rows like "| 3 | `held.rs` | what it is |".
fn ranks(document: &str, heading: &str) -> Ranks {
    let mut ranks = Ranks::new();
    for row in table(document, heading).lines() {
        let mut cells = row.split('|').skip(1).map(str::trim);
        let (Some(rank), Some(file)) = (cells.next(), cells.next()) else { continue };
        let (Ok(rank), Some(module)) = (rank.parse(), file.trim_matches('`').strip_suffix(".rs")) else {
            continue;
        };
        assert!(ranks.insert(module.to_owned(), rank).is_none(), "{heading}: `{module}` is listed twice");
    }
    ranks
}

/// Module → its text. What lies in a folder belongs to the module that the folder is named after.
fn modules(folder: &str) -> BTreeMap<String, String> {
    let mut modules = BTreeMap::new();
    for path in sources(&[folder]) {
        let inside =
            path.strip_prefix(root().join(folder)).expect("a source lies in its folder").with_extension("");
        if inside.ends_with("tests") {
            continue;
        }
        let first = inside.components().next().expect("a source has a name");
        let module: &mut String =
            modules.entry(first.as_os_str().to_string_lossy().into_owned()).or_default();
        module.push_str(&read(&path));
    }
    modules
}

/// The imports that do not go down: (module, what it imports).
fn upward(ranks: &Ranks, modules: &BTreeMap<String, String>) -> Vec<(String, String)> {
    let rank = |module: &str| ranks.get(module).copied();
    let exports = modules.get("lib").map(|lib| exports(&code_of(lib))).unwrap_or_default();
    let mut found = Vec::new();
    for (module, text) in modules.iter().filter(|(module, _)| *module != "lib") {
        for import in imports(&product_code_of(text), &exports) {
            if import != *module
                && let Some(theirs) = rank(&import)
                && rank(module).is_none_or(|mine| theirs >= mine)
            {
                found.push((module.clone(), import));
            }
        }
    }
    found
}

/// The modules, and names of the crate's root resolved to modules, that the code mentions by `crate::` or `super::`.
fn imports(code: &str, exports: &BTreeMap<String, String>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for prefix in ["crate::", "super::"] {
        for (at, _) in code.match_indices(prefix) {
            for first in first_names(&code[at + prefix.len()..]) {
                found.insert(exports.get(&first).cloned().unwrap_or(first));
            }
        }
    }
    found
}

/// Exported name → its module, from the `use` lines of a `lib.rs`.
fn exports(code: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for (at, _) in code.match_indices("pub use ") {
        let line = code[at + "pub use ".len()..].split(';').next().unwrap_or_default();
        let Some((module, names)) = line.split_once("::") else { continue };
        for name in names.trim_matches(['{', '}', ' ', '\n']).split(',') {
            let name = name.split(" as ").last().unwrap_or(name).trim();
            found.insert(name.to_owned(), module.trim().to_owned());
        }
    }
    found
}

/// `a` of `a::b`, `a` and `c` of `{a::b, c}`.
fn first_names(path: &str) -> Vec<String> {
    let identifier = |text: &str| -> String {
        text.trim_start().chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
    };
    let Some(list) = path.strip_prefix('{') else { return vec![identifier(path)] };
    let (mut depth, mut start, mut found) = (1, 0, Vec::new());
    for (at, letter) in list.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 || (depth == 1 && letter == ',') {
            found.push(identifier(&list[start..at]));
            start = at + 1;
        }
        if depth == 0 {
            break;
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

/// The part of a manifest from a header to the next.
fn section<'a>(manifest: &'a str, header: &str) -> &'a str {
    let start = manifest.find(header).unwrap_or_else(|| panic!("no {header}")) + header.len();
    manifest[start..].split("\n[").next().unwrap_or_default()
}

/// Code without the modules for tests, which may know whatever they like.
fn product_code_of(text: &str) -> String {
    let mut product = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if !(line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test")) {
            product.push_str(line);
            product.push('\n');
        } else if lines.find(|line| !line.starts_with("#[")).is_some_and(|item| item.ends_with('{')) {
            lines.find(|line| *line == "}"); // where the formatter puts the end of an item
        }
    }
    code_of(&product)
}

/// The text without comments and without what stands in strings and characters.
fn code_of(text: &str) -> String {
    let letters: Vec<char> = text.chars().collect();
    let at = |index: usize| letters.get(index).copied().unwrap_or('\0');
    let (mut code, mut here) = (String::new(), 0);
    while here < letters.len() {
        match (at(here), at(here + 1)) {
            ('/', '/') => here += letters[here..].iter().take_while(|letter| **letter != '\n').count(),
            ('/', '*') => {
                let mut depth = 0;
                loop {
                    match (at(here), at(here + 1)) {
                        ('/', '*') => (depth, here) = (depth + 1, here + 2),
                        ('*', '/') => (depth, here) = (depth - 1, here + 2),
                        _ => here += 1,
                    }
                    if depth == 0 || here >= letters.len() {
                        break;
                    }
                }
            }
            ('b', '"' | '\'') => here += 1,
            ('r', '"' | '#') | ('b', 'r') if raw_string(&letters[here..]).is_some() => {
                here += raw_string(&letters[here..]).unwrap_or(1);
            }
            ('"', _) => {
                here += 1;
                while here < letters.len() && at(here) != '"' {
                    here += if at(here) == '\\' { 2 } else { 1 };
                }
                here += 1;
                code.push(' ');
            }
            // A character, not a lifetime.
            ('\'', '\\') => {
                here += 3 + letters[here + 3..].iter().take_while(|letter| **letter != '\'').count() + 1
            }
            ('\'', _) if at(here + 2) == '\'' => here += 3,
            (letter, _) => {
                code.push(letter);
                here += 1;
            }
        }
    }
    code
}

/// The length of the raw string that `letters` begin with.
fn raw_string(letters: &[char]) -> Option<usize> {
    let text: String = letters.iter().take(16).collect();
    let opening = text.trim_start_matches('b').strip_prefix('r')?;
    let hashes = opening.chars().take_while(|letter| *letter == '#').count();
    if opening.chars().nth(hashes) != Some('"') {
        return None;
    }
    let start = text.len() - opening.len() + hashes + 1;
    let closing: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let inside = letters[start..].windows(closing.len()).position(|window| window == closing)?;
    Some(start + inside + closing.len())
}

/// The words of all names: `JsonCodec` is `json` and `codec`, `serve_hub` is `serve` and `hub`.
fn words(text: &str) -> impl Iterator<Item = String> {
    let mut words = vec![String::new()];
    let letters: Vec<char> = text.chars().collect();
    for (index, letter) in letters.iter().enumerate() {
        let before = index.checked_sub(1).and_then(|index| letters.get(index)).copied().unwrap_or(' ');
        let after = letters.get(index + 1).copied().unwrap_or(' ');
        let begins = letter.is_uppercase() && (before.is_lowercase() || after.is_lowercase());
        if begins || !letter.is_alphanumeric() {
            words.push(String::new());
        }
        if letter.is_alphanumeric()
            && let Some(word) = words.last_mut()
        {
            word.extend(letter.to_lowercase());
        }
    }
    words.into_iter().filter(|word| !word.is_empty())
}

/// Whether `word` stands in the code, not as a part of a longer name. Lifetimes are no words.
fn contains_word(code: &str, word: &str) -> bool {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_' || letter == '\'';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(is_part)
            && (!word.ends_with(char::is_alphanumeric) || !after.is_some_and(is_part))
    })
}
