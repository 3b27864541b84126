//! Standard input, output and error.

use serde_json::json;

use crate::case::{case, same};

#[test]
fn streams() {
    let large: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    same(vec![
        case("nothing", "cat"),
        case("a line", "cat").input("a\n"),
        case("no end of line", "cat; echo .").input("a"),
        case("bytes", "md5sum").input([0, 255, 10, 13, 0, 128]),
        case("much of it", "md5sum").input(large.clone()),
        case("there and back", "cat | md5sum; cat | wc -c").input(large.clone()),
        case("much that is not read", "head -c 3; exit 6").input(large),
        case(
            "two streams",
            "echo out; echo err >&2; echo out; echo err >&2",
        ),
        case(
            "much output",
            "yes 0123456789 | head -n 100000 | md5sum; yes 0123456789 | head -n 100000",
        ),
        case("much on both", "seq 20000; seq 20000 >&2"),
        case("output that is closed", "exec >&-; echo a; echo $? >&2"),
        case("input that is closed", "exec <&-; cat; echo $?"),
        case("output without an end of line", "printf a; printf b >&2"),
        case(
            "output of what is left behind",
            "(sleep 1000; echo never) & echo now",
        ),
        case(
            "they are pipes",
            "for n in 0 1 2; do readlink /proc/self/fd/$n | cut -d: -f1; done; tty; echo $?",
        ),
        case(
            "the devices for them",
            "echo a >/dev/stdout; echo b >/dev/stderr; cat /dev/stdin",
        )
        .input("c\n"),
        case("opened again", "echo a >/proc/self/fd/1; echo b >/dev/fd/2"),
        case(
            "lines are read one by one",
            "while read -r a b; do echo \"$b $a\"; done",
        )
        .input("1 2\n3 4\n5 6"),
        case("it goes on when its input ends", "cat; echo after"),
        case("one output closed, the other not", "exec >&-; cat >&2").input("b\n"),
        case("the other", "exec 2>&-; cat; echo lost >&2; echo $?").input("b\n"),
        case("both", "exec >&- 2>&-; cat; exit 7").input("b\n"),
    ]);
}

/// One end of a pipe goes before the other.
#[test]
fn half_closed() {
    const READS_ONE_LINE: &str = "{ \"$@\"; echo $? >&2; } | head -n 1";
    same(vec![
        case("what is written is read no more", "exec yes").by(READS_ONE_LINE),
        case(
            "the shell sees it",
            "trap '' PIPE; echo a; until ! echo a; do :; done 2>/dev/null; exit 3",
        )
        .by(READS_ONE_LINE),
        case(
            "errors go on",
            "trap '' PIPE; while echo a; do :; done 2>/dev/null; echo on >&2; exit 3",
        )
        .by(READS_ONE_LINE),
        case("no input", "cat; echo $?").by("exec \"$@\" </dev/null"),
        case("input from a file", "cat | wc -l").by("seq 100 >$BUNDLE/in; exec \"$@\" <$BUNDLE/in"),
        // Who has read too much of a file goes back.
        case("of which one line is read", "head -n 1; cat | wc -l")
            .by("seq 100 >$BUNDLE/in; exec \"$@\" <$BUNDLE/in")
            .differs("Standard streams are pipes or a terminal in the container"),
        case("output to a file", "echo a; seq 10000; echo b >&2")
            .by("\"$@\" >$BUNDLE/out; c=$?; md5sum <$BUNDLE/out; exit $c"),
        case("both to one", "echo a; echo b >&2; echo c")
            .by("\"$@\" >$BUNDLE/out 2>&1; c=$?; sort $BUNDLE/out; exit $c"),
        case("input that does not end", "head -n 1; exit 4").by("yes | \"$@\""),
    ]);
}

#[test]
fn terminals() {
    same(vec![
        case(
            "its name",
            "tty; ls -l /dev/console | cut -c1; test -t 0 && test -t 1 && test -t 2 && echo all",
        )
        .on_a_terminal(),
        case("its modes", "stty rows 24 cols 80; stty -a").on_a_terminal(),
        case("its size", "stty size")
            .on_a_terminal()
            .differs("A terminal is as large as the one that shows it"),
        case("its owner", "stat -c '%u %a' $(tty)")
            .set("/process/user", json!({"uid": 1000, "gid": 1000}))
            .on_a_terminal(),
        case("ends of lines", "echo a; echo b >&2; printf 'c\\rd\\n'").on_a_terminal(),
        case(
            "what is typed",
            "stty -echo; echo ready; read -r a; echo \"($a)\"",
        )
        .on_a_terminal()
        .input("typed\n"),
        case("what is echoed", "echo ready; read -r a; echo \"($a)\"")
            .on_a_terminal()
            .input("typed\n"),
        case(
            "an interrupt",
            "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 1; done",
        )
        .on_a_terminal()
        .input("\u{3}"),
        case("an end", "echo ready; cat; echo ended")
            .on_a_terminal()
            .input("line\n\u{4}"),
        case(
            "raw",
            "stty raw -echo; echo ready; head -c 3 | od -c; stty sane",
        )
        .on_a_terminal()
        .input("abc"),
        case(
            "it controls",
            "echo a >/dev/tty; cut -d' ' -f7 /proc/1/stat; cut -d' ' -f8 /proc/$$/stat",
        )
        .on_a_terminal(),
        case("an exit code", "exit 42").on_a_terminal(),
        case("no output", "true").on_a_terminal(),
        case("much of it", "seq 30000").on_a_terminal(),
        case("a size of its own", "stty size")
            .set("/process/consoleSize", json!({"height": 11, "width": 22}))
            .on_a_terminal(),
    ]);
}
