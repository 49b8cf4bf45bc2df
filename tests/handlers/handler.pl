# The handler of the integration tests: does what the request's path says, well or badly.
#
# In Perl, because it is ready in a few milliseconds and its image has seven files, libraries included: tests start it
# some thousand times. No module is in that image, so what Perl has not built in is done by hand; support.py puts a
# line in front with this machine's numbers of system calls, %SYS.
#
# /misbehave in the rootfs, which a test writes from outside after the deploy, makes it fail before it is ready. $ANSWER
# is what it answers to what is no command.

sub forever {
    select(undef, undef, undef, 3600) while 1;
}

sub misbehave_at_start {
    open(my $file, "<", "/misbehave") or return "";
    my $how = <$file>;
    chomp $how;
    if ($how eq "exit") {
        print STDERR "I refuse to start\n";
        exit 3;
    }
    forever() if $how eq "never-connect";
    return $how;
}

sub send_all {
    my ($client, $data) = @_;
    for (my $sent = 0; $sent < length $data;) {
        $sent += syswrite($client, $data, length($data) - $sent, $sent) // die "write: $!\n";
    }
}

sub respond {
    my ($client, $text) = @_;
    send_all($client, "HTTP/1.1 200 OK\r\nContent-Length: " . length($text) . "\r\nConnection: close\r\n\r\n$text");
}

sub contents {
    my ($path) = @_;
    open(my $file, "<", $path) or die "$path: $!\n";
    local $/;
    return <$file>;
}

sub names {
    my ($path) = @_;
    opendir(my $directory, $path) or die "$path: $!\n";
    my @names = grep { !/^\.\.?$/ } readdir $directory;
    closedir $directory;
    return sort @names;
}

sub links {
    my ($path) = @_;
    return { map { $_ => readlink "$path/$_" } grep { -l "$path/$_" } names($path) };
}

# Numbers are those that have been put into a list by themselves: \1.
sub json {
    my ($value) = @_;
    if (ref $value eq "HASH") {
        return "{" . join(", ", map { json($_) . ": " . json($value->{$_}) } sort keys %$value) . "}";
    }
    return "[" . join(", ", map { json($_) } @$value) . "]" if ref $value eq "ARRAY";
    return 0 + $$value if ref $value;
    $value =~ s/([^ !#-\[\]-~])/sprintf("\\u%04x", ord $1)/ge;
    return "\"$value\"";
}

# What a container can see of itself.
sub facts {
    my %status = contents("/proc/self/status") =~ /^(\w+):\s*(.*)$/mg;
    my ($group, @groups) = split / /, $(;
    return {
        env => \%ENV, argv => [$0, @ARGV], cwd => readlink("/proc/self/cwd"), pid => \$$,
        ids => [\$<, \$group, [map { \$_ } syscall($SYS{getgroups}, 0, 0) ? @groups : ()]],
        hostname => contents("/proc/sys/kernel/hostname") =~ s/\n//r, fds => links("/proc/self/fd"),
        status => { map { $_ => $status{$_} } qw(CapEff CapBnd CapPrm NoNewPrivs Seccomp) },
        interfaces => [sort(contents("/proc/net/dev") =~ /^\s*(\S+):/mg)],
        processes => [grep { /^\d+$/ } names("/proc")], namespaces => links("/proc/self/ns"),
        mounts => [map { [(split / /)[1 .. 3]] } split /\n/, contents("/proc/mounts")],
    };
}

sub is_blocking {
    my ($file, $wanted) = @_;
    my $flags = fcntl($file, 3, 0) + 0;                                     # F_GETFL, F_SETFL, O_NONBLOCK
    fcntl($file, 4, $wanted ? $flags & ~2048 : $flags | 2048) if defined $wanted;
    return !($flags & 2048);
}

sub second_connect {
    socket(my $control, 1, 1, 0) or die "socket: $!\n";
    return connect($control, pack("S a*", 1, "/control.sock")) ? "done" : "$!";
}

sub stream {
    my ($client, $size) = @_;
    send_all($client, "HTTP/1.1 200 OK\r\nContent-Length: $size\r\n\r\n");
    my $block = "\0" x (1 << 20);
    while ($size > 0) {
        $size -= syswrite($client, $block, $size) // die "write: $!\n";
    }
}

# Leave as much to the kernel as it takes, for the client to fetch.
sub fill {
    my ($client) = @_;
    setsockopt($client, 1, 7, 1 << 17);                                     # SOL_SOCKET, SO_SNDBUF
    is_blocking($client, 0);
    my $block = "\0" x (1 << 16);
    1 while defined syswrite($client, $block);
}

# Two-way traffic for as long as the client wants it, as a WebSocket would.
sub echo {
    my ($client) = @_;
    send_all($client, "HTTP/1.1 101 Switching Protocols\r\n\r\n");
    while (my $got = sysread($client, my $data, 65536) // die "read: $!\n") {
        send_all($client, $data);
    }
}

# Write the same page to stdout without end, by reference, so that it costs nothing, and a byte for every 4 MiB to the
# client.
sub splice {
    my ($client) = @_;
    my $page = ("x" x 65535) . "\n";
    my ($vector, $size) = (pack("P Q", $page, 65536), 0);                   # struct iovec
    while (($size += syscall($SYS{vmsplice}, 1, $vector, 1, 0)) >= 0) {
        if ($size >= 4 << 20) {
            send_all($client, "4");
            $size = 0;
        }
    }
}

# A line for the client after each printed one, until the test makes a file in the rootfs.
sub work {
    my ($client, $key) = @_;
    send_all($client, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
    for (my $number = 0; !-e "/$key"; $number++) {
        syswrite(STDOUT, "working $number\n");
        send_all($client, "$number\n");
        select(undef, undef, undef, 0.02);
    }
    syswrite(STDOUT, "done\n");
    send_all($client, "done\n");
}

my $half = "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this";
my $evil = "evil \x1b[2J\r2026-01-01T00:00:00.000Z forged > outcome=answered\x9b\xe2\x80\xa8end\n";

# command => what is done with the client, the argument behind "?", the control connection.
my %commands = (
    "/facts" => sub { respond($_[0], json(facts())) },
    "/id" => sub { respond($_[0], $ENV{FAAS_CONTAINER_ID}) },
    "/label" => sub { select(undef, undef, undef, $_[1]) if $_[1]; respond($_[0], $ENV{LABEL}) },
    "/label-after" => sub {                             # a test has made this file in the rootfs
        select(undef, undef, undef, 0.05) until -e $_[1];
        respond($_[0], $ENV{LABEL});
    },
    "/exit" => sub {                                    # without a byte
        print STDERR "about to exit\n";
        exit $_[1];
    },
    "/answer-and-exit" => sub { respond($_[0], "good-bye"); exit $_[1] },
    "/hang" => sub { @SIG{qw(TERM INT)} = ("IGNORE") x 2; forever() },
    "/half-and-die" => sub { send_all($_[0], $half); exit 1 },
    "/half-and-hang" => sub { send_all($_[0], $half); forever() },
    "/fork-and-linger" => sub {                         # the child keeps the client's socket and the container's pipe
        if (fork == 0) {
            syscall($SYS{setsid});
            forever();
        }
        respond($_[0], "parent");
        exit 0;
    },
    "/fork-silently" => sub {                           # as above, but nobody answers, and the first process stays
        forever() if fork == 0;
        close $_[2];
        forever();
    },
    "/let-go-and-stay" => sub {                         # answers, lets go of the control connection, does not exit
        respond($_[0], "stays");
        close $_[2];
        forever();
    },
    "/stderr" => sub {
        my $block = ("x" x 1023) . "\n";
        syswrite(STDERR, $block) for 1 .. $_[1] / length $block;
        respond($_[0], "written");
    },
    "/newlines" => sub {
        syswrite(STDOUT, "\n" x 50_000) for 1 .. $_[1] / 50_000;
        respond($_[0], "written");
    },
    "/controls" => sub { syswrite(STDOUT, $evil); respond($_[0], "printed") },
    "/flood" => sub {                                   # more than a pipe holds, once the test says so
        select(undef, undef, undef, 0.02) until -e "/$_[1]";
        syswrite(STDOUT, "flood $_ " . ("x" x 80) . "\n") for 0 .. 2999;
        respond($_[0], "flooded");
    },
    "/work" => sub { work($_[0], $_[1]) },
    "/silent" => sub {                                  # exits without a word, once the test says so
        select(undef, undef, undef, 0.02) until -e "/$_[1]";
        exit 3;
    },
    "/splice" => sub { &splice($_[0]) },
    "/stream" => sub { stream($_[0], $_[1]) },
    "/leave-much" => sub { fill($_[0]); exit 0 },
    "/finish-and-stay" => sub {                         # ends its answer, and holds on to its client
        fill($_[0]);
        shutdown($_[0], 1);
        forever();
    },
    "/say-ready" => sub { syswrite($_[2], "R"); forever() },        # and nothing else
    "/echo" => sub { echo($_[0]) },
    "/second-connect" => sub { respond($_[0], second_connect()) },
    "/write" => sub { respond($_[0], open(my $file, ">", $_[1]) ? "done" : "$!") },
    "/read" => sub { respond($_[0], contents($_[1])) },
    "/junk" => sub { send_all($_[2], "junk" x 1000); respond($_[0], "junk sent") },
    "/blocking" => sub { respond($_[0], is_blocking($_[0]) ? "True" : "False") },
    "/forks" => sub {                                   # until the pids limit
        for (my $count = 0;; $count++) {
            my $child = fork;
            return respond($_[0], $count) if !defined $child;
            forever() if !$child;
        }
    },
    "/memory" => sub { my $memory = "x" x $_[1]; respond($_[0], length $memory) },
    "/memory-of-child" => sub {
        if (fork == 0) {
            my $memory = "x" x $_[1];
            exit 0;
        }
        forever();
    },
);
$commands{"/half-and-memory"} = sub { send_all($_[0], $half); $commands{"/memory-of-child"}->(@_) };

sub serve {
    my ($client, $control, $path) = @_;
    my ($command, $argument) = split /\?/, $path, 2;
    if ($argument =~ s/^(.*?)://) {                     # only when the test says so: Daemon.release
        my $key = $1;
        select(undef, undef, undef, 0.01) until -e "/$key";
    }
    my $action = $commands{$command} // return respond($client, $ENV{ANSWER} // "hello $path");
    $action->($client, $argument, $control);
}

# Return the descriptor that comes with the next message, or nothing at the end.
sub receive {
    my ($control) = @_;
    my ($byte, $ancillary) = ("\0", "\0" x 24);                             # CMSG_SPACE(sizeof(int))
    my $vector = pack("P Q", $byte, 1);
    my $message = pack("Q L x4 P Q P Q l x4", 0, 0, $vector, 1, $ancillary, 24, 0);    # struct msghdr
    my $got = syscall($SYS{recvmsg}, fileno($control), $message, 0);
    return if $got <= 0 or unpack("x40 Q", $message) < 20;
    return unpack("x16 l", $ancillary);
}

sub main {
    my $how = misbehave_at_start();
    socket(my $control, 1, 1, 0) or die "socket: $!\n";                     # AF_UNIX, SOCK_STREAM
    shutdown($control, 0) if $how eq "deaf";                                # it connects, but receives nothing
    connect($control, pack("S a*", 1, "/control.sock")) or die "connect: $!\n";
    close $control if $how eq "let-go";
    forever() if $how;
    while (defined(my $descriptor = receive($control))) {
        open(my $client, "+<&=", $descriptor) or die "open: $!\n";
        my ($head, $got) = ("", 1);
        while ($got and index($head, "\r\n\r\n", length($head) < 70_000 ? 0 : length($head) - 70_000) < 0) {
            $got = sysread($client, $head, 65536, length $head) // die "read: $!\n";
        }
        serve($client, $control, $head =~ /^[^ ]* ([^ ]*)/ ? $1 : "/");
        shutdown($client, 1) or die "shutdown: $!\n";
        close $client;
        syswrite($control, "R") // die "write: $!\n";
    }
}

$SIG{PIPE} = "IGNORE";                                  # who has left is an error of write(2), also for a child
eval { main(); 1 } or do {
    print STDERR $@;
    exit 1;
};
