# A handler of seven files, libraries included, that is ready in a few milliseconds: for tests that deploy time and
# again. Answers with $LABEL, /sleep?N after N seconds. /splice writes the same page to stdout without end, by reference, so
# that it costs nothing, and sends its client a byte for every 4 MiB. Numbers of system calls come from the environment: no
# perl has them built in.

socket(my $control, 1, 1, 0) or die "socket: $!";                   # AF_UNIX, SOCK_STREAM
connect($control, pack("S a*", 1, "/control.sock")) or die "connect: $!";
while (1) {
    my ($byte, $ancillary) = ("\0", "\0" x 24);                     # CMSG_SPACE(sizeof(int))
    my $vector = pack("P Q", $byte, 1);
    my $message = pack("Q L x4 P Q P Q l x4", 0, 0, $vector, 1, $ancillary, 24, 0);    # struct msghdr
    my $got = syscall($ENV{SYS_recvmsg} + 0, fileno($control), $message, 0);
    exit 0 if $got <= 0 or unpack("x40 Q", $message) < 20;
    open(my $client, "+<&=", unpack("x16 l", $ancillary)) or die "open: $!";
    my $head = "";
    while ($head !~ /\r\n\r\n/) {
        sysread($client, $head, 65536, length $head) or last;
    }
    select(undef, undef, undef, $1) if $head =~ m{^\S+ /sleep\?([\d.]+)};
    if ($head =~ m{^\S+ /splice}) {
        my $page = ("x" x 65535) . "\n";
        my ($vector, $size) = (pack("P Q", $page, 65536), 0);           # struct iovec
        while (($size += syscall($ENV{SYS_vmsplice} + 0, 1, $vector, 1, 0)) >= 0) {
            if ($size >= 4 << 20) {
                syswrite($client, "4");
                $size = 0;
            }
        }
    }
    syswrite($client, "HTTP/1.1 200 OK\r\nContent-Length: " . length($ENV{LABEL}) . "\r\n\r\n" . $ENV{LABEL});
    shutdown($client, 1);
    close($client);
    syswrite($control, "R");
}
