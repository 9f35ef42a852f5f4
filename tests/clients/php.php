<?php
// PHP's curl, as a portal uses it: a handle for each request, or one for all.
[, $keep, $url] = $argv;
foreach (array_slice($argv, 3) as $request) {
    [$method, $target, $type, $file, $expect] = array_pad(explode(' ', $request), 5, '');
    $curl = ($keep === 'new' || !isset($curl)) ? curl_init() : $curl;
    curl_reset($curl); // its connections stay
    curl_setopt_array($curl, [
        CURLOPT_URL => $url . $target,
        CURLOPT_NOBODY => $method === 'HEAD',
        CURLOPT_RETURNTRANSFER => true,
        CURLOPT_TIMEOUT => 20,
        CURLOPT_EXPECT_100_TIMEOUT_MS => 15000,
        CURLOPT_CAINFO => getenv('CA'),
        CURLOPT_SSLCERT => getenv('CERT'),
        CURLOPT_SSLKEY => getenv('KEY'),
    ]);
    if ($method === 'POST') {
        curl_setopt($curl, CURLOPT_POSTFIELDS, file_get_contents($file));
        curl_setopt($curl, CURLOPT_HTTPHEADER, ["Content-Type: $type", "Expect: $expect"]);
    }
    if (curl_exec($curl) === false) {
        throw new Exception(curl_error($curl));
    }
    echo curl_getinfo($curl, CURLINFO_RESPONSE_CODE), "\n";
}
